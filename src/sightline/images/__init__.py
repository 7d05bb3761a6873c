"""Image file to pixels: decoding, the pixel contract, augmentation."""
