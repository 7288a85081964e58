"""Pure losses: tensors in, one number per row out."""
