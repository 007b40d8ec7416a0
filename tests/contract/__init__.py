"""What our own layers and PEFT's accelerated ones both do: `subject` says how tests ask for it."""
