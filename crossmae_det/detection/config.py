"""The keys that yaml configs have on top of detectron2's."""

from detectron2.config import CfgNode

IMAGE_SIZE = 1024  # ViTDet's; where INPUT.IMAGE_SIZE is None


def add_crossmae_config(cfg: CfgNode) -> None:
    """Add the keys of the trunk, the pyramid and the training recipe to a detectron2 config.

    A value of 0 (or "" or an empty list) means "follows from other keys"; each such key says from
    which. The rules are those of the lazy configs.

    Args:
        cfg: detectron2's default config; changed in place.
    """
    vit = cfg.MODEL.VIT = CfgNode()
    vit.SIZE = "base"  # tiny, small, base, large or huge
    vit.EMBED_DIM = 0  # from SIZE
    vit.DEPTH = 0  # from SIZE
    vit.NUM_HEADS = 0  # from SIZE
    vit.PATCH_SIZE = 16
    vit.PRETRAIN_IMG_SIZE = 224
    vit.WINDOW_SIZE = 14
    vit.GLOBAL_BLOCKS = []  # from the depth: four of them, evenly spread
    vit.USE_REL_POS = True
    vit.DROP_PATH_RATE = 0.1
    vit.USE_ACT_CHECKPOINT = False
    vit.FREEZE_BLOCKS = 0
    vit.ATTENTION_BACKEND = "auto"  # or eager, sdpa, folded, flex, chunked: same results

    pyramid = cfg.MODEL.PYRAMID = CfgNode()
    pyramid.OUT_CHANNELS = 256
    pyramid.SCALE_FACTORS = [4.0, 2.0, 1.0, 0.5]
    pyramid.NORM = "LN"
    pyramid.TOP_BLOCK = True
    pyramid.SQUARE_PAD = True

    # Side in pixels, or (height, width): large-scale jitter, test size, padding and position tables
    # follow. None is IMAGE_SIZE; as a default it lets yacs take both.
    cfg.INPUT.IMAGE_SIZE = None
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0  # from the training set

    solver = cfg.SOLVER
    solver.EPOCHS = 100
    solver.MAX_ITER = 0  # from EPOCHS, the training set and IMS_PER_BATCH
    solver.BASE_LR = 0.0  # from IMS_PER_BATCH, by the linear rule
    solver.WEIGHT_DECAY = 0.1
    # Here None means "as WEIGHT_DECAY".
    solver.WEIGHT_DECAY_NORM = 0.0  # of norms in the ViT
    solver.WEIGHT_DECAY_CHANNEL_NORM = None  # of norms in pyramid and heads
    solver.WEIGHT_DECAY_POS_EMBED = 0.0
    solver.LR_DECAY = 0.7  # from one layer of the trunk to the one below
    solver.STEPS = ()  # 8/9 and 26/27 of MAX_ITER
    solver.WARMUP_ITERS = 250
    solver.IMS_PER_BATCH = 64
    solver.CHECKPOINT_PERIOD = 0  # a twentieth of MAX_ITER, at least 100
    cfg.TEST.EVAL_PERIOD = 0  # a twentieth of MAX_ITER, at least 500

    # As in the lazy configs' `train`.
    solver.AMP.ENABLED = True
    solver.AMP.DTYPE = "auto"
    solver.ACCUMULATION = 1
    solver.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    solver.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9999})
    solver.COMPILE = CfgNode({"ENABLED": False})
