"""A wrong line in a method, in what it draws or in what it chooses by turns a named test red.

As :mod:`tests.test_mutations` for kernels: the test passes, the line is planted into the very function that everybody
has imported, and the test must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sparsekern.kernels.eager import places

import sparsekern as sk
from sparsekern.ops import marginals, probes
from sparsekern.topology import sampling as cells
from sparsekern.training import followers, magnitude, metrics, scores
from sparsekern.training.growth import gse
from sparsekern.training.growth.probe_set import ProbeSet
from sparsekern.training.schedules import Schedule
from sparsekern.training.vrpge import budget, masks
from tests import test_methods_conv2d as t_conv
from tests import test_true_gradient as t_true
from tests.kernels.eager import test_places as t_places
from tests.ops import test_marginals as t_marginals
from tests.ops import test_probes as t_probes
from tests.test_mutations import planted
from tests.topology import test_sampling as t_cells
from tests.training import test_metrics as t_books
from tests.training import test_schedules as t_schedules
from tests.training import test_scores as t_scores
from tests.training import test_set as t_set
from tests.training.growth import test_competition as t_growth
from tests.training.growth import test_gradient as t_gradient
from tests.training.growth import test_gse as t_gse
from tests.training.growth import test_rigl as t_rigl
from tests.training.vrpge import test_candidates as t_candidates
from tests.training.vrpge import test_masked as t_masked
from tests.training.vrpge import test_probabilities as t_sampling
from tests.training.vrpge import test_projection as t_projection
from tests.training.vrpge import test_vrpge as t_vrpge

GAN = "gan, to zero"

Mutation = tuple[Any, str, str, Callable[[], object]]
MUTATIONS: dict[str, Mutation] = {
    "SET drops one more": (
        sk.SET.choose,
        "lowest(strength, min(part_of(blocks, fraction)",
        "lowest(strength, min(1 + part_of(blocks, fraction)",
        partial(t_set.test_the_weakest_blocks_are_dropped_rounding_down, 0.17, [1]),
    ),
    "SET grows where blocks are": (
        magnitude.grow_at_random,
        "sample_absent(present,",
        "sample_absent(present[:0],",
        t_set.test_growth_is_in_places_that_were_empty_and_distinct,
    ),
    "a fraction is rounded up": (
        scores.part_of,
        "math.floor(fraction * blocks + 1e-9)",
        "math.ceil(fraction * blocks)",
        partial(t_scores.test_part_of, 100, 0.299, 29),
    ),
    "a free slot counts as the weakest": (
        scores.protect_free,
        "torch.inf)",
        "0.0)",
        partial(t_set.test_the_weakest_blocks_are_dropped_rounding_down, 0.17, [1]),
    ),
    "the weakest of a row is protected": (
        scores.protect_last,
        '"amax")',
        '"amin", include_self=False)',
        t_scores.test_protect_last_by_hand,
    ),
    "all near ties are chosen": (
        places._smallest,
        "chosen = upper < last",
        "chosen = upper <= last",
        partial(t_places.test_lowest_and_highest_of_many, "near ties", 3000, 700, torch.float32),
    ),
    "a choice grows the first places": (
        sk.training.GradientMethod.exchange,
        "highest(offer.scores, count)",
        "torch.arange(min(count, offer.keys.shape[0]))",
        partial(t_gse.test_the_weakest_go_to_the_best_candidates, 0.34, [1, 2], [(1, 2), (2, 0)]),
    ),
    "RigL grows where blocks are": (
        sk.RigL.offer,
        "scores.index_fill_(0, ordered_keys(layer.index, layer.topology).long(), -torch.inf)",
        "scores",
        partial(t_rigl.test_the_weakest_go_where_the_gradient_is_largest, 0.17, [1], [(2, 2)]),
    ),
    "RigL takes 0 and 1 for signs": (
        sk.RigL.ask_sketch,
        "* 2 - 1)",
        "* 1)",
        t_rigl.test_screening_estimates_norms_and_not_sums,
    ),
    "RigL's shortlist holds blocks": (
        sk.RigL._shortlist,
        "squares.index_fill_(0, present, -torch.inf)",
        "pass",
        t_rigl.test_screening_does_not_look_at_places_that_hold_a_block,
    ),
    "a block that wins its place back goes": (
        sk.RigL.exchange,
        "stay = torch.isin(torch.arange(slots.shape[0], device=best.device), best)",
        "stay = torch.zeros_like(slots, dtype=torch.bool)",
        t_rigl.test_regrow,
    ),
    "GSE rounds the subset down": (
        sk.GSE._draw,
        "math.ceil(",
        "math.floor(",
        partial(t_gse.test_with_no_choice_it_is_set, "uniform"),
    ),
    "GSE scores blocks that are there": (
        sk.GSE._draw,
        "distinct_absent(drawn, present, grid.cells)",
        "distinct_absent(drawn, present[:0], grid.cells)",
        t_gse.test_with_replacement_the_wasted_draws_are_not_made_up_for,
    ),
    "GraBo draws by squares": (
        gse.weights,
        "(rows.sqrt(), cols.sqrt())",
        "(rows, cols)",
        t_gse.test_weights_by_hand,
    ),
    "GraEst cuts blocks across taps": (
        gse.weights,
        "into.view(grid.groups, grid.taps, grid.tap_in)",
        "into.view(grid.groups, 1, -1)",
        t_gse.test_weights_of_a_convolution_by_hand,
    ),
    "all groups see what the first sees": (
        cells.sample_pairs,
        "first = row // (rows.shape[0] // groups) * width",
        "first = row * 0",
        partial(t_conv.test_guided_candidates_of_groups_follow_the_joint_distribution, "grabo"),
    ),
    "the joint distribution is not of rank one": (
        cells.sample_pairs,
        "torch.add(row * width, col, out=some)",
        "torch.add(row * width, (col + row) % width, out=some)",
        t_cells.test_the_joint_distribution_has_rank_one,
    ),
    "a draw in order keeps the first": (
        cells._sample_ascending,
        "sample_distinct(keys.shape[0], spare, generator).sort().values",
        "torch.arange(count, keys.shape[0])",
        partial(t_cells.test_every_ascending_number_and_pair_is_as_likely_as_any_other, 200, 30),
    ),
    "repeated draws are kept": (
        places.first_occurrences,
        "ordered[1:] != ordered[:-1]",
        "ordered[1:] >= ordered[:-1]",
        t_places.test_first_occurrences_by_hand,
    ),
    "signs are the same in every batch": (
        marginals.token_signs,
        "_mixed(_content(dy) ^ _mixed(_content(x)))",
        "0",
        partial(t_marginals.test_the_sketch_is_unbiased_where_tokens_have_few_patterns_of_signs, [1] * 12),
    ),
    "tokens of a batch share their sign": (
        marginals.token_signs,
        "counter * GOLDEN",
        "counter * 0",
        partial(t_marginals.test_signs_are_fair_and_independent_in_pairs, "random"),
    ),
    "blocks are guided by absolute values": (
        marginals.magnitudes,
        "power = 1 if block == (1, 1) else 2",
        "power = 1",
        t_marginals.test_magnitudes_by_hand,
    ),
    "a tap sees one pixel further": (
        marginals._seen,
        "first[axis] - before",
        "first[axis] - before + 1",
        t_marginals.test_magnitudes_of_a_convolution_by_hand,
    ),
    "a lattice of tokens starts at the edge": (
        probes._thin,
        "first = (every - 1) // 2",
        "first = 0",
        t_probes.test_a_lattice_by_hand,
    ),
    "a layer grows beyond its slots": (
        scores.share_out,
        "rank < room[",
        "rank <= room[",
        partial(t_growth.test_by_hand, 1, {"a": [(1, 3)], "b": []}),
    ),
    "norms of large blocks count as they are": (
        scores.share_out,
        "strengths[n][s].cpu() / side",
        "strengths[n][s].cpu()",
        t_growth.test_layers_of_other_block_sizes_compare_by_element,
    ),
    "state stays where a block moved": (
        followers.Followers._move,
        "fill_slots_(tensor, slots, fresh)",
        "pass",
        partial(t_gradient.test_what_moves, "GSE"),
    ),
    "answers outlive gradients that were dropped": (
        ProbeSet._drop,
        "self.probes[name].tensor.grad = None",
        "pass",
        partial(t_gradient.test_a_skipped_step_leaves_no_trace, "GSE", False, "in the last layer only"),
    ),
    "answers outlive gradients that were set to zero": (
        ProbeSet._drop,
        "dropped & left.nonzero",
        "~left.anything",
        partial(t_true.test_what_grows_is_largest_in_the_gradient_that_the_optimizer_takes, "linear", "GSE", GAN),
    ),
    "several parts of a gradient count as one": (
        probes.counted,
        "norms.new_ones(1)",
        "norms.new_zeros(1)",
        partial(
            t_true.test_what_grows_is_largest_in_the_gradient_that_the_optimizer_takes, "linear", "RigL", "siamese"
        ),
    ),
    "the drop fraction does not fall": (
        Schedule.cosine,
        "(1 + math.cos(math.pi * counted / (self.stop - self.start))) / 2",
        "1.0",
        t_schedules.test_the_cosine_by_hand,
    ),
    "free slots count as blocks": (
        metrics.TopologyMetrics.add,
        "stored_blocks(layer.index)",
        "layer.topology.slots",
        t_books.test_by_hand,
    ),
    "scores are divided by K": (
        masks.score_gradient,
        "/ (count - 1)",
        "/ count",
        t_sampling.test_by_hand,
    ),
    "scores are scaled by the variance": (
        masks.score_gradient,
        "(s * (1 - s)).sqrt()",
        "(s * (1 - s))",
        partial(t_sampling.test_unbiased_for_the_scaled_gradient_of_the_expected_loss, 2),
    ),
    "masks are of what is left out": (
        masks.draw_masks,
        "torch.lt(chance, below, out=part)",
        "torch.lt(chance, 1 - below, out=part)",
        t_sampling.test_counts_of_masks_are_binomial,
    ),
    "a budget is exceeded by one": (
        budget.top_units,
        ".cumsum(0) <=",
        ".cumsum(0) - 1 <=",
        t_sampling.test_the_likeliest_within_the_budget_and_ties_go_to_the_first,
    ),
    "the projection forgets the costs": (
        budget._by_sorting,
        "torch.where(moving, c.square(), 0).sum()",
        "torch.where(moving, c, 0).sum()",
        partial(t_projection.test_by_hand, "sort", [0.8, 0.8], [1, 2], 1.4, 0, [0.6, 0.4]),
    ),
    "the bisection ends on the wrong side": (
        budget._by_halving,
        "0.0, high)",
        "0.0, high / 2)",
        partial(t_projection.test_by_hand, "bisection", [0.8, 0.8], [1, 2], 1.4, 0, [0.6, 0.4]),
    ),
    "passes draw other dropout": (
        masks.masked_passes,
        "randomness.restore()",
        "pass",
        t_vrpge.test_dropout_is_the_same_in_all_passes_and_drawn_once,
    ),
    "norms see every mask": (
        masks.masked_passes,
        "keep_norm_statistics(model) if extra else nullcontext()",
        "nullcontext()",
        partial(t_vrpge.test_running_statistics_see_the_first_mask_only, "one"),
    ),
    "weights see the second mask": (
        masks.masked_passes,
        "layers.lending(masks[number])",
        "layers.lending(masks[-1 - number])",
        partial(t_masked.test_passes_under_masks_by_hand, False),
    ),
    "the optimizer moves what no mask held": (
        sk.VRPGE.before_step,
        "else self._masks[0]",
        "else self._masks[0] | True",
        partial(t_vrpge.test_blocks_that_no_mask_held_are_untouched_state_included, t_vrpge.sgd),
    ),
    "more units move than may": (
        budget.Candidates.refill,
        "count = min(limit,",
        "count = min(limit + 1,",
        t_candidates.test_a_refill_is_at_new_empty_places_and_within_the_limit,
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_line_turns_a_test_red(name):
    function, old, new, check = MUTATIONS[name]
    check()
    with planted(function, old, new), pytest.raises(Exception):  # noqa: B017
        check()
