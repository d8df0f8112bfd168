"""What a first reading skips: it changes no result, only speed, memory, safety or comfort. It imports no story."""
