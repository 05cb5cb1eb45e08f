"""Language models of transformers with fresh weights, and what they make of tokens, as NumPy arrays."""

import json

import numpy as np
import torch
import transformers
from flax import nnx


def reference(architecture, seed=0, **config):
    """transformers' `<architecture>ForCausalLM` in eval mode, every parameter away from its initial value."""
    torch.manual_seed(seed)
    settings = getattr(transformers, f"{architecture}Config")(**config)
    model = getattr(transformers, f"{architecture}ForCausalLM")(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(0.05 * torch.randn_like(parameter))
    return model


def config_of(model):
    """The content of its config.json."""
    return json.loads(model.config.to_json_string(use_diff=False))


def weights_of(model, rename=lambda name: name):
    """Its state_dict, under other names."""
    return {rename(name): value.detach() for name, value in model.state_dict().items()}


def outputs_of(model, ids, **inputs):
    """(logits, hidden states)."""
    inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(ids)), output_hidden_states=True, use_cache=False, **inputs)
    return out.logits.float().numpy(), [state.float().numpy() for state in out.hidden_states]


def gradients_of(model, ids, w):
    """Of sum(logits * w), by parameter."""
    model.zero_grad()
    (model(torch.tensor(np.asarray(ids)), use_cache=False).logits * torch.tensor(np.asarray(w))).sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def twin(theirs, cls, rename=lambda name: name, **options):
    """Our model of that class with the weights of transformers' model, in eval mode."""
    model = nnx.eval_shape(lambda: cls(cls.config_class.from_dict(config_of(theirs)), **options))
    model.load_state_dict(weights_of(theirs, rename))
    model.eval()
    return model


def state_spaces_name(name):
    """The name of a tensor in state-spaces/mamba."""
    return name.replace("embeddings", "embedding")


def close(actual, expected, tolerance=1e-5):
    """Assert max|actual - expected| <= tolerance max(1, max|expected|)."""
    expected = np.asarray(expected)
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(actual, expected.dtype), expected, atol=tolerance * scale, rtol=0)
