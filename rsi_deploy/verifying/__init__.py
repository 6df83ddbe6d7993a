"""`verify`: computes again what a bundle's report claims."""
