# What the engine reads, beside the model, the data, the optimizer and its schedule.
train = dict(
    output_dir=None,  # output/NAME_OF_CONFIG
    init_checkpoint="",  # a backbone or a pretraining run to start from, a detector to evaluate
    epochs=100,
    # Iterations follow: epochs x images that are trained on / total batch size.
    max_iter=(
        "${dataset.iterations:${train.epochs},"
        "${dataloader.train.dataset},${dataloader.train.total_batch_size}}"
    ),
    device="auto",  # CUDA where there is one, else the CPU
    seed=0,
    cudnn_benchmark=False,
    # In training, and in the backbone at inference, where heads run in float32. "auto": bf16 where
    # the device has it; on older GPUs fp16, on older CPUs float32. "bf16" and "fp16" are taken at
    # their word.
    amp=dict(enabled=True, dtype="auto"),
    # The parts that a batch is processed in, to save memory; the result is that of one part.
    gradient_accumulation_steps=1,
    clip_grad=dict(enabled=False, max_norm=1.0),
    ema=dict(enabled=False, decay=0.9999),  # evaluated beside the raw weights
    compile=dict(enabled=False, module="backbone", backend="inductor"),  # torch.compile of a part
    ddp=dict(  # options of DistributedDataParallel
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    # FSDP2: weights, gradients, optimizer in parts over the processes; for jobs without evaluation
    fsdp=dict(enabled=False),
    checkpointer=dict(period="${crossmae.fraction:${train.max_iter},20,100}", max_to_keep=2),
    # The first of the metrics that is measured. mode: "auto" (of a loss lower is better, of others
    # higher), "min" or "max".
    best_checkpoint=dict(metrics=["segm/AP", "bbox/AP"], mode="auto"),
    eval_period="${crossmae.fraction:${train.max_iter},20,500}",  # of the validation loss as well
    # The training losses on dataloader.validation, as "val/total_loss" and "val/NAME".
    validation_loss=dict(enabled=False),
    # Ends the run after so many evaluations in a row that are not better than the best one.
    early_stopping=dict(
        enabled=False,
        patience=5,
        metrics="${train.best_checkpoint.metrics}",
        mode="${train.best_checkpoint.mode}",
    ),
    log_period=20,
    visualizer=None,  # draws what the model does: see engine.hooks.Visualizer
)
