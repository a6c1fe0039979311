"""The configuration of a Tucker-expert adapter."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Optional, Union

from peft import PeftConfig

from .fields import read_object
from .formats import FORMAT_VERSION, known_fields, require_readable, upgrade
from .ops import CORE_GAIN
from .registration import PEFT_TYPE, add_peft_type
from .validation import LONG, NUMBERS, validate

PAPER = dict(
    routing="batch",
    affinity="paper",
    pooling="mean",
    components=0,
    normalize=True,
    form="multiplicative",
    tie_factors=True,
    share_factors=False,
    share_inputs=False,
    shared_expert=False,
    axis_block_size=None,
    block_size=None,
    trained_columns=None,
    trainable="all",
    init_router="perturb",
    init_experts="kaiming",
)
"""What makes a configuration the paper's method (arXiv 2511.06859, section 3)."""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TuckAConfig(PeftConfig):
    """Configuration of Tucker experts; fields not listed here are those of every PEFT configuration.

    Parameters
    ----------
    r, k, t, p : int
        Rank of an expert (R), groups (K), experts in a group (T), rank shared by the experts of a group (P).
    block_size : int, optional
        H: the R×R matrices of a core are zero beside diagonal blocks of H×H, so that experts of high rank have few
        parameters, K·P·R·H: each expert is a sum of R/H Tucker terms (De Lathauwer's block term decomposition). Ranks
        above H are multiples of it; one up to H has a full core, as all have with None.
    alpha : float
        Scale of the adaptation. Unnormalised parameters want a few units, the paper's normalised ones more.
    routing : {"sample", "batch"}
        What is routed as one. A sample's prediction does not depend on its neighbours; a batch's does.
    affinity : {"paper", "cosine", "distance"}
        How a routing feature f is scored against the centroids c. "paper": σ(ℓ / ‖ℓ‖₂) over the T logits ℓ = c·f of a
        group. With ``t=1`` that is σ(±1): the router then receives no gradient and stays where it started.
        The others read the placed feature z (see `components`). "cosine": softmax over all K·T
        experts of cos(z, c) / τ. "distance": softmax over all K·T experts of −‖z − c‖² / (τ s²), with s² the mean
        squared distance of the calibration's z to the nearest centroid: the posterior of a mixture of Gaussians of
        variance τ s² / 2 per entry.
    temperature : float
        τ of the cosine and distance affinities.
    pooling : {"mean", "mean_std"}
        What of the router layer's input makes the feature: its mean, or mean and standard deviation, over unpadded
        tokens.
    components : int
        Q of the k-means starts: z is f − μ on the Q leading principal components of the calibration's features, each
        divided by its standard deviation (whitened), so that a rare sign that few directions carry counts as much as
        what varies most. 0, and with other starts: z = (f − μ) / √(σ σ̄), with the mean μ and the standard deviation σ
        of every entry over the calibration, and σ̄ the root mean square of σ over the entries.
    normalize : {False, True, "bounded"}
        True: divide cores, expert factor and D-mode factors by their Frobenius norms, as the paper does. "bounded":
        U acts as U √R / ‖U‖ (V and C alike), so that one with orthonormal columns acts as it is, and a core 𝒢 as
        γ𝒢 / √(1 + ‖γ𝒢‖²/R), γ = `core_gain`, which is γ𝒢 near zero: the identity start is kept, and no learning rate
        can make an update larger than a fixed multiple of α. One learning rate suits adapter and head.
    core_gain : float
        γ of "bounded" cores, without effect on others: the rate at which experts leave the base model is αγ times the
        learning rate.
    form : {"multiplicative", "additive"}
        Update the layer's input, x' = x + α U Mᵀ Uᵀ x, or add to its output, y = W x + α V Mᵀ Uᵀ x.
    tie_factors : bool
        In the multiplicative form, both D-modes share U.
    share_factors : bool
        Adapted layers with the same name, widths and rank share their D-mode factors.
    share_inputs : bool
        In the multiplicative form, layers that read one tensor (query, key and value; gate and up) share its
        adaptation: x' is computed once for all of them, by the experts of the first. Which layers these are is told by
        their names (see `tucka.plan.INPUT_FAMILIES`); one that is given another tensor after all adapts that.
    shared_expert : bool
        One always-active R×R slice beside the routed groups.
    axis_block_size : int, "auto", "lean" or None
        A: another always-active slice, whose factors are the axes of the layer's input and whose core has diagonal
        blocks of A×A (in a layer whose width A does not divide, of the largest divisor of both): E in x' = x + Eᵀ x,
        whatever `alpha` and `normalize` say. It costs A·D parameters, reaches every direction of a layer, and trains in
        every mode. "auto": 4 where a layer has more than 256 input features, else 2. "lean": 4 where it has no fewer
        outputs either, else 2.
        What the slice adds to W has full rank, so a LoRA that says the same is as large as W; without it (None) updates
        are of rank R.
    axis_bound : float, optional
        b: the parameters E of that slice act as E / √(1 + ‖E‖²/(D b²)), so that the root mean square norm of its rows
        stays below b at any learning rate. None: as they are.
    trained_columns : int, optional
        How many columns of every D-mode factor train, the leading ones; the others stay where they start, and cost
        parameters in the cores alone. None: all.
    trainable : {"all", "core"}
        Train everything but what `trained_columns` holds, or hold the D-mode factors and train the cores, the expert
        factors and the router.
    init_router : {"perturb", "kaiming", "kmeans", "kmeans_balanced"}
        Start of the centroids. "perturb" (paper): the first batch's feature, and that feature plus
        U(−1, 1)·`perturb_scale` per entry; "kaiming": data-free; "kmeans": k-means of the calibration's features gives
        the groups, k-means inside each gives its experts; "kmeans_balanced": the same with no group larger than 1.25
        times the mean, and a bias on the choice that holds the routes to it. Without calibration the k-means starts
        take samples of the first training batch as centroids.
    init_experts : {"identity", "kaiming", "hosvd", "gradient"}
        Start of the experts. "identity": zero cores and random orthonormal factors, so the adapted model equals the
        base model; "kaiming": the paper's; "hosvd": factors from the truncated HOSVD of the activation tensor of the
        calibration; "gradient": from that of the gradient tensor, which needs a loss. Without calibration the last
        two start as "identity" does.
    warm_start : float
        0 starts the "hosvd" and "gradient" experts with zero cores, at the base model; otherwise the cores of the
        decomposition are scaled so that α𝒯[i,j] has this Frobenius norm on average (a step downhill for "gradient").
        "bounded" experts of large norm start smaller.
    perturb_scale : float
        Width of the centroids' perturbation.
    pool_padding : bool
        Let padded positions enter the pooled feature, as the published code does.
    pool_answers : bool
        With sample routing, let the answers that a causal language model is trained on (tokens with a label) enter the
        pooled feature. Generation has the prompt alone to route by, so by default training routes by it as well.
    balance_bias, balance_rate : bool, float
        Auxiliary-loss-free balancing: a bias per expert, for the choice of the group only, moved against the load of
        every training forward by the rate γ.
    sync_route : bool
        In a distributed run, route the global batch as one (``routing="batch"`` only).
    router_module : str, optional
        Name, or end of the name, of the adapted layer whose input feeds the router; default: whichever runs first.
    router_depth : int
        Index of the block whose first adapted layer feeds the router; layers of the blocks before it carry one
        always-active expert and no route.
    lasso : float
        Above 0, a tensor lasso on the ranks (tensorly-torch's): weights that start at 1 multiply every column of the
        factors between the core and them, and this times their mean absolute value is added to the loss that a
        transformers model returns in training; see `tucka.ranks.lasso_penalty` for other losses. What it has driven to
        zero, `tucka.truncate` removes. It needs a core that cannot grow against the weights: ``normalize`` other than
        False, or weight decay.
    rank_pattern : dict, optional
        Ranks of single layers: {regular expression: r}, matched as in PEFT's LoRA.
    expert_shares : bool
        Written by the library: the router keeps which part of its original every expert is, since `tucka.expand`.
    factor_owners : dict, optional
        Written when a model is adapted, for readers of the file: layers, and the layer whose factors each shares.
    format_version : int
        Written by the library: the version of the file's format. Files of a later version are refused.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, bias, init_weights
        As in PEFT; ``bias`` is "none", "all" or "tucka_only", and ``init_weights=False`` draws random experts.

    Raises
    ------
    ValueError
        If a value is outside its range; the message names the field, the value and the rule.
    """

    r: int = _help("Rank of every expert.", 20)
    k: int = _help("Number of expert groups.", 4)
    t: int = _help("Experts in each group.", 1)
    p: int = _help("Rank shared by the experts of a group.", 1)
    block_size: Optional[int] = _help("Width of the diagonal blocks of a core; None: full cores.", 4)
    alpha: float = _help("Scale of the adaptation.", 1.0)
    routing: str = _help("What is routed as one: 'sample' or 'batch'.", "sample")
    affinity: str = _help("How a feature is scored against centroids: 'paper', 'cosine' or 'distance'.", "cosine")
    temperature: float = _help("Temperature of the cosine and distance affinities.", 0.1)
    pooling: str = _help("Routing feature: 'mean' or 'mean_std' over unpadded tokens.", "mean_std")
    components: int = _help("Principal components of the feature that centroids live in; 0: all of it, scaled.", 16)
    normalize: Union[bool, str] = _help("Divide parameters by their norms: True, False or 'bounded'.", "bounded")
    core_gain: float = _help("How many times its parameters a 'bounded' core near zero acts as.", CORE_GAIN)
    form: str = _help("'multiplicative' (on the input) or 'additive' (to the output).", "additive")
    tie_factors: bool = _help("Both D-modes share U (multiplicative form).", True)
    share_factors: bool = _help("Layers of one kind and width share their factors.", True)
    share_inputs: bool = _help("Layers that read one tensor share one adapted input (multiplicative form).", False)
    shared_expert: bool = _help("One always-active slice beside the routed groups.", True)
    axis_block_size: Union[int, str, None] = _help("Width of blocks on the axes, 'auto', 'lean' or None.", "auto")
    axis_bound: Optional[float] = _help("Bound on the slice on the input's axes; None: none.", 0.5)
    trainable: str = _help("'all', or 'core' to hold the D-mode factors.", "core")
    trained_columns: Optional[int] = _help("Columns of the D-mode factors that train; None: all.", None)
    init_router: str = _help("Start of the centroids: 'perturb', 'kaiming', 'kmeans' or 'kmeans_balanced'.", "kmeans")
    init_experts: str = _help("Start of the experts: 'identity', 'kaiming', 'hosvd' or 'gradient'.", "identity")
    warm_start: float = _help("Norm of the experts that 'hosvd' and 'gradient' start with; 0: the base model.", 0.0)
    perturb_scale: float = _help("Width of the centroids' perturbation.", 1.0)
    pool_padding: bool = _help("Padded positions enter the pooled feature.", False)
    pool_answers: bool = _help("Labelled tokens of a causal language model enter the pooled feature.", False)
    balance_bias: bool = _help("Auxiliary-loss-free balancing of the groups.", False)
    balance_rate: float = _help("Rate of the balancing bias.", 1e-3)
    sync_route: bool = _help("One route for the global batch of a distributed run.", False)
    router_module: Optional[str] = _help("Adapted layer that feeds the router; default: the first to run.", None)
    router_depth: int = _help("Block whose first adapted layer feeds the router.", 0)
    lasso: float = _help("Penalty of the tensor lasso on the ranks; 0: none.", 0.0)
    rank_pattern: Optional[dict] = _help("Ranks of single layers, {pattern: r}.", None)
    target_modules: Optional[Union[list[str], str]] = _help("Modules to adapt: names, a regex or 'all-linear'.", None)
    exclude_modules: Optional[Union[list[str], str]] = _help("Modules to leave alone: names or a regex.", None)
    layers_to_transform: Optional[Union[list[int], int]] = _help("Indices of the layers to adapt.", None)
    layers_pattern: Optional[Union[list[str], str]] = _help("Name of the layers' ModuleList.", None)
    modules_to_save: Optional[list[str]] = _help("Other modules to train and save whole.", None)
    bias: str = _help("Biases to train: 'none', 'all' or 'tucka_only'.", "none")
    init_weights: bool = _help("False draws random experts instead of a start.", True)
    expert_shares: bool = _help("Written by the library: experts are parts of those before `expand`.", False)
    factor_owners: Optional[dict] = _help("Written by the library: layers, and whose factors each shares.", None)
    format_version: int = _help("Version of the file format.", FORMAT_VERSION)

    # Field names of adapters saved by the paper's published code: accepted, mapped and not kept.
    ec_perturb_scale: InitVar[Optional[float]] = None
    use_kaiming_init_ec: InitVar[Optional[bool]] = None
    use_alb: InitVar[Optional[bool]] = None
    alb_gamma: InitVar[Optional[float]] = None
    router_name: InitVar[Optional[str]] = None
    dump_input_and_ec: InitVar[Optional[bool]] = None
    log_expert_load: InitVar[Optional[int]] = None

    def __post_init__(
        self, ec_perturb_scale, use_kaiming_init_ec, use_alb, alb_gamma, router_name, dump_input_and_ec, log_expert_load
    ):
        super().__post_init__()
        self.peft_type = add_peft_type(PEFT_TYPE)
        published = (ec_perturb_scale, use_kaiming_init_ec, use_alb, alb_gamma, router_name)
        require_readable(self.format_version)
        self.from_published_code = self.format_version == 0 or any(value is not None for value in published)
        if self.from_published_code:
            self.format_version = 0
        self.weights_beside: Optional[dict] = None  # what the file says that this was read beside; see `tucka.weights`
        for name, value in upgrade({each.name: getattr(self, each.name) for each in fields(self)}).items():
            setattr(self, name, value)
        if self.from_published_code:
            self._read_published_fields(*published)
        validate(self)
        for name in NUMBERS:
            value = getattr(self, name)
            if abs(value) > LONG:  # a tensor takes such a number as a float alone
                setattr(self, name, float(value))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _read_published_fields(self, ec_perturb_scale, use_kaiming_init_ec, use_alb, alb_gamma, router_name) -> None:
        self.init_router = "kaiming" if use_kaiming_init_ec else "perturb"
        self.balance_bias = bool(use_alb)
        self.router_module = router_name or None
        if ec_perturb_scale is not None:
            self.perturb_scale = ec_perturb_scale
        if alb_gamma is not None:
            self.balance_rate = alb_gamma

    def feature_size(self, width: int) -> int:
        """F, entries of the routing feature of a layer with so many input features."""
        return width * (2 if self.pooling == "mean_std" else 1)

    def block_width(self, rank: int) -> int:
        """H, entries in a row of a core of that rank."""
        return min(self.block_size or rank, rank)

    def axis_width(self, features: int, outputs: int) -> Optional[int]:
        """A in a layer of so many input and output features; None without a slice on the axes."""
        if self.axis_block_size is None:
            return None
        if isinstance(self.axis_block_size, int):
            return math.gcd(self.axis_block_size, features)
        # What groups cost does not grow with the width of a layer, so wide ones have room for more on their axes.
        has_room = features > 256 and (self.axis_block_size == "auto" or outputs >= features)
        return math.gcd(4 if has_room else 2, features)

    def trained(self, rank: int) -> int:
        """Columns of a factor of that rank that are no buffer of their own (`held_input`, `held_output`)."""
        return rank if self.trained_columns is None or self.trainable == "core" else min(self.trained_columns, rank)

    def has_whole_blocks(self, rank: int) -> bool:
        """Whether a core of that rank is made of whole blocks."""
        return rank % self.block_width(rank) == 0

    def require_blocks(self, rank: int, where: str) -> None:
        """Refuse, by `ValueError`, a rank that is not made of whole blocks."""
        if not self.has_whole_blocks(rank):
            raise ValueError(
                f"rank {where} is not a multiple of block_size={self.block_size}: "
                "take one that is, or block_size=None for full cores"
            )

    @property
    def whitens(self) -> bool:
        """Whether centroids live among principal components of the features."""
        return self.components > 0 and self.affinity != "paper" and self.init_router.startswith("kmeans")

    def placed_size(self, width: int) -> int:
        """Q, entries of a feature as it lies among the centroids."""
        features = self.feature_size(width)
        return min(self.components, features) if self.whitens else features

    @classmethod
    def paper(cls, **fields: Any) -> TuckAConfig:
        """The paper's preset: normalised parameters, batch routing, per-group normalised sigmoid scores, perturbed
        centroids; sizes as published for GLUE (r=8, k=t=p=2, α=2, perturbation 10). `fields` override any of it.
        """
        sizes = dict(r=8, k=2, t=2, p=2, alpha=2.0, perturb_scale=10.0)
        return cls(**{**PAPER, **sizes, **fields})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict:
        """Refuse a file of a later version and leave out fields that are not known (called by PEFT on loading).

        A file without our format version has the paper's semantics; see `tucka.formats`.
        """
        kwargs.setdefault("format_version", 0)
        return super().check_kwargs(**known_fields(kwargs, cls.__dataclass_fields__))

    def to_dict(self) -> dict:
        """The fields; sets in order, so that equal configurations make equal files in every process."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict:
        """Read the fields of a configuration file (called by PEFT on loading); see `tucka.fields.read_object`."""
        return read_object(path_json_file)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any):
        """Read a configuration, and check the weights beside it against it before any model is touched.

        Raises
        ------
        ValueError
            If the configuration is none of this method, or the weights are no whole safetensors file, hold values that
            are not finite or have shapes that disagree with the configuration.
        """
        from .weights import check_weights_beside

        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub_options, _, _ = cls._split_kwargs(kwargs)
        config.weights_beside = check_weights_beside(pretrained_model_name_or_path, subfolder, config, **hub_options)
        return config
