"""What the tasks share whose targets are words that a decoder writes."""

from torch import Tensor

from mm.encoders.text import Tokenizer
from mm.models.decoder import right_padded
from mm.tasks.task import Preparation, Transform


class WritingPreparation(Preparation):
    """An image, a text for the text tower, and words to write."""

    def __init__(self, transform: Transform, tokenizer: Tokenizer, length: int) -> None:
        """At most `length` words are written."""
        self.transform = transform
        self.tokenizer = tokenizer
        self.length = length

    def columns(self, read: list[list[int]], written: list[list[int]]) -> dict[str, Tensor]:
        """input_ids and mask (B, L) of what is read, words and words_mask (B, T) of what is written."""
        input_ids, mask = self.tokenizer.pad(read)
        words, words_mask = right_padded(written, pad_id=self.tokenizer.pad_id, length=self.length)
        return {"input_ids": input_ids, "mask": mask, "words": words, "words_mask": words_mask}
