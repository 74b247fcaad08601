"""Networks: tensors in, tensors out; they know torch and torchvision.ops and nothing of files."""
