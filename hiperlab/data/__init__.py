"""What a run learns from: concepts (photographs, words, prompts) and the batches drawn from them."""
