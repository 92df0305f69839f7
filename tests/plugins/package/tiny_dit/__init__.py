"""Extensions of ddpm-pipeline, as another package brings them."""
