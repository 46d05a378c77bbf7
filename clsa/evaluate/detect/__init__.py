"""Object detection and instance segmentation.

In come an encoder and pictures with boxes and masks, which can be made here. Out goes the average
precision of a detector that was trained on the encoder.

    scenes.py    drawings on textures, with known boxes and masks
    box_ap.py    average precision by VOC's and COCO's rule
    detector.py  Faster R-CNN and Mask R-CNN around an encoder
    detect.py    train a detector, then judge it
"""
