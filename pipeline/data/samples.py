"""From a record of a shard to one training sample: text tokens with their positions and targets, images with theirs.

Visual tokens are not part of the text. They only take up positions: with v = 3 visual tokens per image the record
`<s> <image> a cake`, of which "a cake" is to be learned, becomes::

    full sequence     <s>  I0 I1 I2   a  cake
    position            0   1  2  3   4     5
    text_token_ids    <s>             a  cake
    text_positions      0             4     5
    targets            --          cake    --      "a" follows a visual token: dropped and counted
    image_positions         1
"""

from dataclasses import dataclass

import numpy as np

from common.console import count_text
from pipeline.data.templates import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    ConversationError,
    SpecialTokens,
    Tokenizer,
    encode_conversation,
)


@dataclass(frozen=True, eq=False)
class Sample:
    """T text tokens and the images they may look at.

    Args:
        text_token_ids: int64[T].
        text_positions: int64[T], position in the full sequence, in which an image takes v positions.
        targets: int64[T], the token to predict after each, or `IGNORE_INDEX`.
        image_positions: int64[M], position of the first visual token of each image that is kept, ascending.
        image_indices: int64[M], which of the record's images those are.
        num_targets: targets that are not `IGNORE_INDEX`; 0 is possible, such a sample trains nothing.
        num_dropped_targets: tokens to be learned that follow a visual token, so that no text token can predict them.
        num_truncated_tokens: text tokens cut off at the end.
    """

    text_token_ids: np.ndarray
    text_positions: np.ndarray
    targets: np.ndarray
    image_positions: np.ndarray
    image_indices: np.ndarray
    num_targets: int
    num_dropped_targets: int
    num_truncated_tokens: int

    def sizes(self) -> tuple[int, int, int, int, int]:
        """Returns the numbers of text tokens, images, targets, dropped targets and truncated tokens."""
        counted = self.num_targets, self.num_dropped_targets, self.num_truncated_tokens
        return len(self.text_token_ids), len(self.image_positions), *counted


def build_sample(
    record: dict,
    template: str,
    tokenizer: Tokenizer,
    num_visual_tokens_per_image: int,
    max_positions: int,
    special_tokens: SpecialTokens = "refuse",
) -> Sample:
    """Returns the sample of a record, cut to its first `max_positions` positions.

    An image that no remaining text token can see is dropped: nothing would read it.

    Args:
        record: as in a shard, with `conversations` and `images`.
        template: a name in `pipeline.data.templates.TEMPLATES`.
        tokenizer: that of the language model.
        num_visual_tokens_per_image: v, positions that one image takes.
        max_positions: longest sample, text and visual tokens together.
        special_tokens: what becomes of turns that spell a special token.

    Raises:
        ConversationError: the record cannot be encoded; the message names it.
        ValueError: the template or the tokenizer is wrong for every record.
    """
    images = record.get("images", [])
    try:
        encoded = encode_conversation(record["conversations"], bool(images), template, tokenizer, special_tokens)
        token_ids, labels = np.array(encoded.token_ids, np.int64), np.array(encoded.labels, np.int64)
        num_image_tokens = int((token_ids == IMAGE_TOKEN_INDEX).sum())
        if num_image_tokens != len(images):
            raise ConversationError(
                f"{count_text(num_image_tokens, '<image> token')} left in the text but "
                f"{count_text(len(images), 'image')}"
            )
        return _cut(token_ids, labels, num_visual_tokens_per_image, max_positions)
    except ConversationError as error:
        raise ConversationError(f"record {record.get('id')} (index {record.get('source_index')}): {error}") from None


def _cut(token_ids: np.ndarray, labels: np.ndarray, num_visual_tokens: int, max_positions: int) -> Sample:
    """Returns the sample of a whole sequence: places its tokens, shifts its labels, cuts its end."""
    is_image = token_ids == IMAGE_TOKEN_INDEX
    widths = np.where(is_image, num_visual_tokens, 1)
    positions = np.cumsum(widths) - widths
    text = ~is_image & (positions < max_positions)
    num_kept = int(text.sum())
    if num_kept == 0:
        raise ConversationError(f"no text token within max_positions={max_positions}; raise it or leave the record out")
    visible = is_image & (positions < positions[text][-1])

    previous_is_image = np.concatenate([[False], is_image[:-1]])
    next_label = np.concatenate([labels[1:], [IGNORE_INDEX]])
    next_is_text = np.concatenate([text[1:], [False]])
    targets = np.where(next_is_text, next_label, IGNORE_INDEX)[text]
    return Sample(
        text_token_ids=token_ids[text],
        text_positions=positions[text],
        targets=targets,
        image_positions=positions[visible],
        image_indices=np.flatnonzero(visible[is_image]),
        num_targets=int((targets != IGNORE_INDEX).sum()),
        num_dropped_targets=int((text & previous_is_image & (labels != IGNORE_INDEX)).sum()),
        num_truncated_tokens=int((~is_image).sum()) - num_kept,
    )
