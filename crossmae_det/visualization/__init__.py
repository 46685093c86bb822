"""Pictures and prediction files.

``predictions`` draws instances and ground truth, ``curves`` plots a training log, ``grids`` puts
pictures side by side, ``analysis`` what
a pretraining decoder looks at, ``inference_io`` reads images and videos and writes predictions,
``files`` writes any of them atomically. Import from these modules directly: importing this package
alone pulls in neither matplotlib nor detectron2.
"""
