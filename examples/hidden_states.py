"""Ask each depth of a model what it knows: a linear classifier on what its blocks put out.

python examples/hidden_states.py [--join ADDR] [--model NAME] [--data FILE] [--short]
"""

import torch
from transformers import AutoConfig, AutoTokenizer
from tutorial import load_reviews, read_options, swarm_of

from petals import AutoDistributedModel

options = read_options("A linear classifier on the outputs of a model's blocks")
num_train, num_test = (8, 4) if options.short else (160, 80)
train, test = (part[:size] for part, size in zip(load_reviews(options.data), (num_train, num_test)))
tokenizer = AutoTokenizer.from_pretrained(options.model)


@torch.inference_mode()
def features(model: torch.nn.Module, reviews: list[tuple[str, int]]) -> list[torch.Tensor]:
    """For the embeddings and each block: its states' means over a review, [reviews, hidden]."""
    found = []
    for first in range(0, len(reviews), 16):
        texts = [text for text, _ in reviews[first : first + 16]]
        encoded = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=48
        )
        states = model(**encoded, output_hidden_states=True).hidden_states
        mask = encoded["attention_mask"][..., None]
        found.append([(layer * mask).sum(1) / mask.sum(1) for layer in states])
    return [torch.cat(parts) for parts in zip(*found)]


def probe(seen: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    """Logistic regression, a little regularised."""
    head = torch.nn.Linear(seen.shape[1], 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02, weight_decay=0.5)
    for _ in range(200):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(seen)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


num_blocks = AutoConfig.from_pretrained(options.model).num_hidden_layers
with swarm_of(options, num_blocks) as initial_peers:
    model = AutoDistributedModel.from_pretrained(
        options.model, initial_peers=initial_peers, dtype=torch.float32
    )
    seen, unseen = features(model, train), features(model, test)

labels, truth = (torch.tensor([float(label) for _, label in part]) for part in (train, test))
for depth, (known, new) in enumerate(zip(seen, unseen)):
    mean, spread = known.mean(0), known.std(0) + 1e-6
    head = probe(((known - mean) / spread).clone(), labels)
    with torch.no_grad():
        guesses = head((new - mean) / spread)[:, 0] > 0
    accuracy = (guesses == truth.bool()).float().mean().item()
    print(f"after {depth:2} blocks: {accuracy:.2f} {'#' * round(40 * accuracy)}")
