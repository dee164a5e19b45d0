"""Vision-and-language navigation: the world (simulator, distances, metrics, text) and the model (ORIST and its agent).

Each of the two modules looks at what a case contains and returns None if it is the other's.
"""

import goldens_vln_model
import goldens_vln_world

# The world's cases compare by themselves.
is_expected = getattr(goldens_vln_model, "is_expected", lambda name: name.startswith("out."))
tolerance = getattr(goldens_vln_model, "tolerance", lambda name: None)


def run_case(meta, tensors, path):
    for module in (goldens_vln_world, goldens_vln_model):
        computed = module.run(meta, tensors, path)
        if computed is not None:
            return computed
    content = sorted(meta) if isinstance(meta, dict) else type(meta).__name__
    raise LookupError(f"no module computes a case with {content}")
