"""What a first reading skips: speed, memory, safety and comfort. It imports no story."""
