"""The `train` key of every config: what the engine reads beside model, data and optimizer."""

from detectron2.config import LazyCall as L

from crossmae_det.report import RunReport

train = dict(
    output_dir=None,  # output/NAME_OF_CONFIG
    init_checkpoint="",  # a backbone or a pretraining run to start from, a detector to evaluate
    epochs=100,
    # Iterations follow: epochs x images that are trained on / total batch size.
    max_iter=(
        "${dataset.iterations:${train.epochs},"
        "${dataloader.train.dataset},${dataloader.train.total_batch_size}}"
    ),
    device="auto",  # CUDA if there is a GPU, else the CPU
    seed=0,
    cudnn_benchmark=False,
    # Mixed precision of training, and of the backbone at inference, where heads run in float32.
    # "auto": bf16 if the device has it; else fp16 on GPUs and float32 on CPUs. Or "bf16", "fp16".
    amp=dict(enabled=True, dtype="auto"),
    # Parts that a batch is processed in, to save memory; the result is the same.
    gradient_accumulation_steps=1,
    clip_grad=dict(enabled=False, max_norm=1.0),
    ema=dict(enabled=False, decay=0.9999),  # evaluated beside the raw weights
    compile=dict(enabled=False, module="backbone", backend="inductor"),  # torch.compile of a part
    ddp=dict(  # options of DistributedDataParallel
        broadcast_buffers=False,
        find_unused_parameters=False,
        fp16_compression=False,
    ),
    # FSDP2: weights, gradients and optimizer sharded over processes; for jobs without evaluation
    fsdp=dict(enabled=False),
    checkpointer=dict(period="${crossmae.fraction:${train.max_iter},20,100}", max_to_keep=2),
    # The first of the metrics that is measured counts. mode: "auto" (lower is better for losses,
    # higher for others), "min" or "max".
    best_checkpoint=dict(metrics=["segm/AP", "bbox/AP"], mode="auto"),
    eval_period="${crossmae.fraction:${train.max_iter},20,500}",  # of the validation loss as well
    # The losses on dataloader.validation, as "val/total_loss" and "val/NAME".
    validation_loss=dict(enabled=False),
    # Ends the run after `patience` evaluations in a row without a better one.
    early_stopping=dict(
        enabled=False,
        patience=5,
        metrics="${train.best_checkpoint.metrics}",
        mode="${train.best_checkpoint.mode}",
    ),
    log_period=20,
    # Loggers beside metrics.json and TensorBoard, if installed. name: None is the folder's name.
    wandb=dict(enabled=False, project="crossmae_det", entity=None, name=None, tags=[]),
    # tracking_uri: a server or "sqlite:///FILE"; None: MLflow's own default.
    mlflow=dict(enabled=False, tracking_uri=None, experiment="crossmae_det", name=None),
    visualizer=None,  # draws what the model does: see engine.hooks.Visualizer
    report=L(RunReport)(output_dir="${train.output_dir}"),  # report.html; null: none
)
