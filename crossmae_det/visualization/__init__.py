"""Pictures and prediction files.

``predictions`` draws instances and ground truth in the colors of ``colors``, ``curves`` plots a
training log, ``grids`` puts pictures side by side, ``analysis`` draws what a pretraining decoder
looks at, ``inference_io`` finds images and videos and writes predictions, ``files`` writes any of
them atomically. Import from these modules directly: importing this package alone pulls in neither
matplotlib nor detectron2.
"""
