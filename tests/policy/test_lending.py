"""Who lends to whom: the worked examples of the schedulers people know, by name, and ours."""

import numpy as np
import pytest
from world import DRAINING, INF, LOADING, NOBODY, READY, Fleet, said

from waterline.policy import holdings
from waterline.policy.decisions import RULES

# --- Kueue: concepts/cluster_queue.md; nominalQuota = deserved, quota that is not lent = guarantee ---------------------


def test_kueue_a_queue_borrows_all_unused_quota_of_its_cohort() -> None:
    fleet = Fleet((21,), {"team_a": (0, 9, 21), "team_b": (0, 12, 21)}).want(team_a=30)
    fleet.step()
    assert fleet.gpus_of("team_a") == 12 + 9


def test_kueue_borrowing_limit_1_admits_10() -> None:
    fleet = Fleet((21,), {"team_a": (0, 9, 9 + 1), "team_b": (0, 12, 21)}).want(team_a=30)
    fleet.step()
    assert fleet.gpus_of("team_a") == 10


def test_kueue_without_a_borrowing_limit_the_other_queue_uses_21() -> None:
    fleet = Fleet((21,), {"team_a": (0, 9, 9 + 1), "team_b": (0, 12, 21)}).want(team_b=30)
    fleet.step()
    assert fleet.gpus_of("team_b") == 12 + 9


def test_kueue_lending_limit_1_lets_the_other_queue_admit_10() -> None:
    fleet = Fleet((21,), {"team_a": (0, 9, 21), "team_b": (12 - 1, 12, 21)}).want(team_a=30)
    fleet.step()
    assert fleet.gpus_of("team_a") == 9 + 1


def test_kueue_who_is_below_its_nominal_quota_is_admitted_before_who_would_borrow() -> None:
    fleet = Fleet((21,), {"team_a": (0, 9, 21), "team_b": (0, 12, 21)}).want(team_a=30, team_b=30).run("team_a", 9)
    started = fleet.step()
    assert started.claimant.tolist() == [1] * 12
    assert (fleet.gpus_of("team_a"), fleet.gpus_of("team_b")) == (9, 12)


# --- Volcano: docs/design/capacity-scheduling.md, docs/user-guide/how_to_use_capacity_plugin.md ------------------------


def test_volcano_story_4_reclaims_40_of_60_and_leaves_the_guarantee_of_20() -> None:
    fleet = Fleet((100,), {"queue1": (20, 20, 60), "queue2": (10, 80, 100)})
    fleet.want(queue1=100).settle()
    assert fleet.gpus_of("queue1") == 60
    fleet.want(queue2=100)
    assert sum(said(fleet.step()).count(("drain", "reclaim")) for _ in range(400)) == 40
    assert (fleet.gpus_of("queue1"), fleet.gpus_of("queue2")) == (20, 80)


def test_volcano_user_guide_queue2_reclaims_its_6_of_8_and_2_stay() -> None:
    fleet = Fleet((4, 4), {"queue1": (0, 2, 8), "queue2": (0, 6, 8)}).want(queue1=8).settle()
    assert fleet.gpus_of("queue1") == 8
    fleet.want(queue2=8).settle(100)
    assert (fleet.gpus_of("queue1"), fleet.gpus_of("queue2")) == (2, 6)


# --- KAI: docs/fairness, cmd/fairshare-simulator, priority-based-fair-share.md, plugins/minruntime ---------------------


def test_kai_fair_share_fills_quotas_then_shares_the_rest_by_weight() -> None:
    fleet = Fleet((100,), {"queue1": (0, 10, 100), "queue2": (0, 10, 100)}, weight={"queue1": 3, "queue2": 1})
    fleet.want(queue1=100, queue2=100).step()
    assert (fleet.gpus_of("queue1"), fleet.gpus_of("queue2")) == (70, 30)


def test_kai_what_is_left_reaches_lower_priorities_last() -> None:
    shares = {"a": (0, 20, 200), "b": (0, 30, 200), "c": (0, 30, 200)}
    fleet = Fleet((200,), shares, priority={"a": 100, "b": 100, "c": 50}, weight={"a": 0, "b": 2, "c": 1})
    fleet.want(a=70, b=50, c=90).step()
    assert (fleet.gpus_of("a"), fleet.gpus_of("b"), fleet.gpus_of("c")) == (70, 50, 80)


def test_kai_at_20_s_of_a_minimum_runtime_of_30_s_a_job_is_protected() -> None:
    fleet = Fleet((8,), {"production": (0, 2, 8), "research": (0, 6, 8)}, min_runtime_s=30).run("production", 8)
    fleet.want(production=8, research=6)
    fleet.now_s = 20
    assert said(fleet.moves()) == []
    fleet.now_s = 30
    assert ("drain", "reclaim") in said(fleet.moves())


# --- Ours -------------------------------------------------------------------------------------------------------------


def two_nodes(**options: object) -> Fleet:
    """Two nodes of 8 GPUs; the public borrows, and its replicas take 8 GPUs, those of research 4."""
    shares = {"public": (0.0, 0.0, 16.0), "research": (0.0, 8.0, 16.0)}
    return Fleet((8, 8), shares, {"public": 1}, model_gpus=((8, 8), (4, 4)), **options)


def test_a_borrower_of_higher_priority_outbids_a_loan_and_leaves_what_is_deserved() -> None:
    fleet = two_nodes().run("research", 2, node=0).run("research", 2, node=1).want(public=16, research=INF)
    assert said(fleet.step())[:3] == [
        ("hold", "freed for claim"),
        ("drain", "outbid loan"),
        ("drain", "outbid loan"),
    ]
    fleet.settle()
    assert (fleet.gpus_of("public"), fleet.gpus_of("research")) == (8, 8)


@pytest.mark.parametrize(("deserved", "outbids"), [(4, True), (6, False)])
def test_a_loan_is_outbid_only_as_far_as_its_tenant_keeps_what_it_deserves(deserved: int, outbids: bool) -> None:
    shares = {"public": (0, 0, 8), "research": (0, deserved, 8)}
    fleet = Fleet((8,), shares, {"public": 1}, model_gpus=((4,), (4,))).run("research", 2).want(public=4, research=INF)
    assert (("drain", "outbid loan") in said(fleet.moves())) == outbids


@pytest.mark.parametrize(("guarantee", "reclaims"), [(0, True), (4, False)])
def test_a_replica_that_would_take_its_tenant_below_the_guarantee_stays(guarantee: int, reclaims: bool) -> None:
    fleet = Fleet((8,), {"a": (0, 2, 8), "b": (guarantee, 6, 8)}, model_gpus=((2,), (8,))).run("b").want(a=2, b=8)
    assert (("drain", "reclaim") in said(fleet.moves())) == reclaims, "it has 8, more than the 6 it deserves"


@pytest.mark.parametrize(("limit", "claims"), [(8, True), (6, False)])
def test_nobody_claims_beyond_its_limit(limit: int, claims: bool) -> None:
    fleet = Fleet((8,), {"public": (0, 0, limit), "research": (0, 0, 8)}, {"public": 1}, model_gpus=((4,), (4,)))
    fleet.run("public").run("research").want(public=8, research=INF)
    assert (("drain", "outbid loan") in said(fleet.moves())) == claims


def test_when_nobody_can_give_alone_those_give_first_who_have_the_most_over_what_they_deserve() -> None:
    shares = {"a": (0, 8, 8), "b": (0, 3, 8), "c": (0, 2, 8), "d": (0, 1, 8)}
    fleet = Fleet((12,), shares, model_gpus=((8,), (4,), (4,), (4,)))
    fleet.run("b").run("c").run("d").want(a=8, b=4, c=4, d=4)
    assert fleet.moves().victim.tolist() == [NOBODY, 2, 1], "d has four times what it deserves, c twice, b 4 of 3"


def test_who_has_the_most_over_what_it_deserves_gives_alone_though_others_would_lose_less() -> None:
    fleet = Fleet((4, 4), {"a": (0, 4, 8), "b": (0, 1, 8), "c": (0, 3, 8)}, model_gpus=((4, 4),) * 3)
    fleet.run("b", node=0, lost_gpu_s=500).run("c", node=1).want(a=4, b=4, c=4)
    assert fleet.moves().victim.tolist() == [NOBODY, 0]


def test_a_loan_moves_to_the_node_where_least_is_lost() -> None:
    fleet = two_nodes().want(public=8, research=INF)
    fleet.run("research", 2, node=0, lost_gpu_s=50).run("research", 1, node=1, lost_gpu_s=90).run("research", 1, node=1)
    assert fleet.moves().node.tolist()[0] == 1  # 90 GPU-seconds are lost there, 100 on the other


def test_who_would_take_the_gpus_of_another_of_its_tenant_is_left_alone() -> None:
    """Both nodes would lose the same; but what is asked of research would only move to where its job runs."""
    fleet = Fleet(
        (2, 2), {"public": (0, 0, 4), "asked": (0, 2, 4), "job": (0, 0, 4)}, priority={"public": 2, "asked": 1}
    )
    fleet.layouts.gpus[0] = 2
    fleet.services.tenant[2] = 1
    fleet.run("asked", 2, node=0).run("job", 2, node=1).want(public=1, asked=2, job=INF)
    moves = fleet.moves()
    assert said(moves) == [("hold", "freed for claim"), *[("drain", "outbid loan")] * 2]
    assert moves.node.tolist() == [1, 1, 1]
    fleet.want(asked=0)
    assert fleet.moves().node.tolist() == [0, 0, 0]


def test_the_load_time_of_the_model_on_the_node_is_part_of_the_price() -> None:
    fleet = two_nodes().want(public=8, research=INF)
    fleet.run("research", 2, node=0, lost_gpu_s=50).run("research", 2, node=1)
    assert fleet.moves().node.tolist()[0] == 1
    fleet.layouts.load_s[0, 1] = 75  # 15 s longer on 8 GPUs: 120 GPU-seconds
    moves = fleet.moves()
    assert moves.node.tolist()[0] == 0
    assert moves.cost_gpu_s.tolist() == [0.0, 50 + 4 * 30, 50 + 4 * 30]
    assert moves.deadline_s.tolist() == [30.0] * 3


def test_a_model_without_a_layout_on_a_node_never_goes_there() -> None:
    fleet = Fleet((8, 8), {"public": (0, 8, 16)}, model_gpus=((0, 8),)).want(public=16).settle()
    assert fleet.free_gpus.tolist() == [8, 0]


def test_nothing_that_loads_is_stopped() -> None:
    fleet = Fleet((8,), {"public": (0, 2, 8), "research": (0, 6, 8)}, load_s=100).want(public=8)
    fleet.step()
    fleet.want(research=6)
    for _ in range(9):
        assert said(fleet.step()) == []
        assert (fleet.replicas.state[:8] == LOADING).sum() + (fleet.replicas.state[:8] == READY).sum() == 8
    assert ("drain", "reclaim") in said(fleet.step())


def test_freed_gpus_are_kept_for_their_claimant() -> None:
    fleet = Fleet((8,), {"a": (0, 8, 8), "b": (0, 0, 8), "c": (0, 0, 8)}, model_gpus=((8,), (4,), (4,)))
    fleet.run("b", 2).want(a=8, b=8)
    fleet.step()
    fleet.want(c=8)  # a third asks while the second half drains
    victims = np.flatnonzero(fleet.replicas.state == DRAINING)
    holdings.has_ended(fleet.free_gpus, fleet.claims, fleet.replicas, victims[0])
    assert (fleet.claims.held_gpus[0], fleet.free_gpus[0]) == (4, 0)
    assert said(fleet.moves()) == []
    holdings.has_ended(fleet.free_gpus, fleet.claims, fleet.replicas, victims[1])
    assert said(fleet.step()) == [("start", "claim kept")]
    assert fleet.gpus_of("a") == 8


def test_a_claim_that_is_complete_starts_though_another_waits_for_what_its_tenant_stops_itself() -> None:
    """With both replicas, and its job that still drains, the tenant seems to be beyond its limit of 8; it is not."""
    shares = {"asked": (0, 8, 8), "other": (0, 0, 8), "job": (0, 0, 8)}
    fleet = Fleet((4, 4), shares, {"asked": 1}, model_gpus=((4, 4),) * 3)
    fleet.services.tenant[2] = 0
    fleet.run("job", node=0, lost_gpu_s=50).run("other", node=1).want(asked=8, other=4, job=INF)
    moves = said(fleet.step())
    assert [rule for kind, rule in moves if kind == "drain"] == ["reclaim", "own surplus"]
    holdings.has_ended(fleet.free_gpus, fleet.claims, fleet.replicas, 1)
    assert said(fleet.step()) == [("start", "claim kept")]
    occupied = fleet.replicas.gpus[(fleet.replicas.state != holdings.GONE) & (fleet.replicas.service != 1)]
    assert occupied.sum() == 8


def test_a_claim_that_is_no_longer_needed_is_given_back_to_all() -> None:
    fleet = Fleet((8,), {"a": (0, 8, 8), "b": (0, 0, 8)}, model_gpus=((8,), (4,)), grace_s=400)
    fleet.run("b", 2).want(a=8, b=8)
    fleet.step()
    for _ in range(39):
        assert said(fleet.want(a=0).step()) == [], "they drain until 400 s"
    assert fleet.claims.held_gpus[0] == 8
    moves = said(fleet.step())
    assert moves == [("hand back", "claim dropped"), ("start", "borrow idle"), ("start", "borrow idle")]
    assert (fleet.claims.held_gpus[0], fleet.claims.service[0], fleet.gpus_of("b")) == (0, NOBODY, 8)


def test_a_claim_that_cannot_be_completed_is_dropped_and_its_tenant_starts_elsewhere_at_once() -> None:
    fleet = Fleet((8, 8), {"a": (0, 8, 8), "b": (0, 0, 16)}, model_gpus=((8, 8), (4, 4))).run("b").want(a=8, b=4)
    fleet.claims.service[0], fleet.claims.held_gpus[0], fleet.free_gpus[0] = 0, 4, 0  # nothing drains for it any more
    moves = fleet.moves()
    assert said(moves) == [("hand back", "claim dropped"), ("start", "own, idle")]
    assert (moves.node.tolist(), moves.gpus.tolist()) == ([0, 1], [4, 8])


def test_while_gpus_are_freed_for_a_claim_it_counts_as_its_tenants() -> None:
    fleet = Fleet((8, 8), {"a": (0, 8, 8), "b": (0, 0, 16)}, model_gpus=((8, 0), (4, 4))).run("b", 2).want(a=16, b=8)
    fleet.step()
    fleet.layouts.gpus[0, 1] = fleet.layouts.rate[0, 1] = 8
    assert said(fleet.moves()) == [], "it has its limit of 8, though the other node idles"


def test_a_claim_is_kept_by_who_needs_just_that_replica() -> None:
    fleet = Fleet((8,), {"a": (0, 8, 8), "b": (0, 0, 8)}, model_gpus=((8,), (4,))).run("b", 2).want(b=8).settle(40)
    fleet.want(a=8).step(30.0)
    assert said(fleet.step()) == [("start", "claim kept")]


def test_what_was_freed_beyond_a_claim_is_there_for_others_in_the_same_step() -> None:
    shares = {"a": (0, 4, 8), "b": (0, 0, 8), "c": (0, 0, 8)}
    fleet = Fleet((8,), shares, model_gpus=((4,), (8,), (4,))).run("b").want(a=4, c=4)
    fleet.step(30.0)
    assert said(fleet.step()) == [("start", "claim kept"), ("start", "borrow idle")]


def test_whoever_is_not_needed_in_the_end_is_put_back() -> None:
    """The small one gives first, because its tenant deserves nothing; with the large one it is not needed."""
    shares = {"a": (0, 4, 8), "b": (0, 0, 8), "c": (0, 1, 8)}
    fleet = Fleet((8,), shares, model_gpus=((4,), (1,), (4,))).run("b", 1).run("c", 1).want(a=4, b=1, c=4)
    fleet.free_gpus[0] -= 3  # of somebody who cannot be stopped
    assert fleet.moves().victim.tolist() == [NOBODY, 1]


def test_a_tenant_first_uses_what_another_of_its_models_can_spare() -> None:
    fleet = Fleet((8,), {"a": (8, 8, 8), "b": (0, 0, 8)}, model_gpus=((2,), (2,)))
    fleet.services.tenant[1] = 0  # two models of one tenant
    fleet.run("a", 4).want(a=2, b=2)
    assert said(fleet.moves()) == [("hold", "freed for claim"), ("drain", "own surplus")]


def test_what_could_be_spared_for_five_minutes_is_handed_back_with_a_deadline() -> None:
    fleet = Fleet((8,), {"public": (0, 0, 8)}).run("public", 8).want(public=8).settle(3)
    fleet.want(public=2)
    handed_back = [fleet.step() for _ in range(40)]
    times_s = [30 + 10 * step for step, moves in enumerate(handed_back) if len(moves.kind)]
    assert times_s == [330], "once, and not before 300 s"
    moves = next(moves for moves in handed_back if len(moves.kind))
    assert said(moves) == [("hand back", "surplus")] * 5, "a tenth more than is needed stays"
    assert moves.deadline_s.tolist() == [330 + 30] * 5


def test_what_is_handed_back_is_ones_own_and_of_that_what_loses_least_and_then_the_newest() -> None:
    fleet = Fleet((8,), {"public": (0, 0, 8), "job": (0, 0, 8)})
    fleet.run("job", 2).run("public", lost_gpu_s=9).run("public", since_s=-5).run("public").run("public", since_s=-9)
    fleet.want(public=4, job=2).settle(40)
    fleet.want(public=1)
    moves = next(moves for moves in (fleet.step() for _ in range(40)) if len(moves.kind))
    assert said(moves) == [("hand back", "surplus")] * 2
    assert moves.victim.tolist() == [4, 3]


def test_a_replica_starts_where_it_leaves_the_fewest_gpus_idle() -> None:
    fleet = Fleet((8, 4, 6), {"public": (0, 0, 18)}, model_gpus=((4, 4, 4),)).want(public=8)
    assert fleet.moves().node.tolist() == [1, 2]


def test_no_replica_goes_back_before_its_minimum_runtime() -> None:
    fleet = Fleet((8,), {"public": (0, 0, 8)}, min_runtime_s=600).run("public", 8).want(public=2)
    times_s = [fleet.now_s for _ in range(80) if len(fleet.step().kind)]
    assert times_s == [610], "decided at 600 s, though they could be spared from 300 s on"


def test_what_loads_is_no_reason_to_hand_back_what_answers() -> None:
    fleet = Fleet((4,), {"public": (0, 0, 4)}, load_s=1000.0).run("public").want(public=2)
    assert said(fleet.step()) == [("start", "borrow idle")]
    fleet.want(public=0.9).settle(90)
    assert (fleet.replicas.state == READY).sum() == 1, "it serves while the other loads"
    fleet.settle(90)
    assert (fleet.replicas.state == READY).sum() == 1, "when both answer, one of them goes"
    assert fleet.gpus_of("public") == 1


def test_who_has_its_own_loading_still_has_what_another_tenant_of_the_model_could_hand_back() -> None:
    fleet = shared(public=(0, 0, 8), enterprise=(0, 8, 8)).run("enterprise")
    fleet.layouts.load_s[:] = 1000.0
    fleet.want(public=1, enterprise=1).step()
    fleet.want(enterprise=0).settle(60)
    assert (fleet.replicas.state == READY).sum() == 1


def test_a_guarantee_is_not_handed_back_because_nobody_else_may_use_it() -> None:
    fleet = Fleet((8,), {"enterprise": (4, 6, 8)}).run("enterprise", 8).want(enterprise=0).settle(50)
    assert fleet.gpus_of("enterprise") == 4


def test_what_will_be_reclaimed_soon_is_not_lent() -> None:
    fleet = Fleet((8,), {"public": (0, 0, 8), "research": (0, 6, 8)}).want(public=8)
    fleet.services.kept[1] = 4.0  # research will need so many within minutes
    fleet.step()
    assert fleet.gpus_of("public") == 4


def test_below_the_guarantee_comes_first_then_below_deserved_then_borrowing() -> None:
    shares = {"borrower": (0, 0, 9), "owner": (0, 3, 9), "guaranteed": (3, 3, 9)}
    fleet = Fleet((9,), shares, {"borrower": 9}).want(borrower=9, owner=9, guaranteed=9)
    assert fleet.step().claimant.tolist() == [2] * 3 + [1] * 3 + [0] * 3


@pytest.mark.parametrize("cold_starts", [0.5, 1.0, 2.0])
def test_a_square_wave_makes_no_more_than_one_round_trip_a_period(cold_starts: float) -> None:
    load_s, grace_s, step_s = 120.0, 30.0, 10.0
    fleet = Fleet((8, 8), {"public": (0, 4, 16), "research": (0, 8, 16)}, {"public": 1}, load_s=load_s, grace_s=grace_s)
    fleet.want(research=INF, public=2).settle(60)
    period_s = cold_starts * load_s
    periods = 20
    starts = {0: 0, 1: 0}  # of the public, of research
    begin_s = fleet.now_s
    while fleet.now_s < begin_s + periods * period_s:
        high = (fleet.now_s - begin_s) % period_s < period_s / 2
        moves = fleet.want(public=8 if high else 2).step(step_s)
        for service in moves.claimant[moves.kind == holdings.START].tolist():
            starts[service] += 1
    assert starts[0] == 6, "it borrows once, and stays: the load came back within five minutes each time"
    assert starts[1] == 0
    fleet.want(public=2).settle(60)
    assert (fleet.gpus_of("public"), fleet.gpus_of("research")) == (3, 13), "then research has them back"


def test_every_move_names_its_rule() -> None:
    named = {code for code in RULES if code >= 50}
    fleet = two_nodes().run("research", 2, node=0).run("research", 2, node=1).want(public=16, research=INF)
    seen = {int(rule) for _ in range(30) for rule in fleet.step().rule}
    assert seen
    assert seen <= named


# --- Tenants of the same model ----------------------------------------------------------------------------------------


def shared(**shares: tuple[float, float, float]) -> Fleet:
    """Return a fleet of eight GPUs on which all tenants ask for the same model."""
    fleet = Fleet((8,), shares)
    fleet.services.model[:] = 0
    return fleet


def test_what_a_tenant_can_spare_passes_to_another_of_the_same_model_as_it_runs() -> None:
    fleet = shared(public=(0, 2, 8), enterprise=(2, 6, 8)).want(public=5, enterprise=2).run("enterprise", 6)
    moves = fleet.step()
    assert said(moves)[:3] == [("take over", "spared")] * 3  # two more are needed, and start on idle GPUs
    assert said(moves)[3:] == [("start", "borrow idle")] * 2
    assert moves.cost_gpu_s[:3].tolist() == [0.0] * 3
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (5, 3)  # a fiftieth above what it needs is kept


def test_what_serves_another_model_is_not_taken_over() -> None:
    fleet = Fleet((8,), {"public": (0, 8, 8), "enterprise": (0, 0, 8), "other": (0, 0, 8)})
    fleet.services.model[:], fleet.services.tenant[:] = (0, 0, 1), (0, 1, 1)
    moves = fleet.run("other", 4).run("enterprise", 2).want(public=4).moves()
    assert moves.victim[moves.kind == holdings.TAKE_OVER].tolist() == [4, 5], "its four of the other model stay"


def test_a_guarantee_is_not_taken_over() -> None:
    fleet = shared(public=(0, 2, 8), enterprise=(6, 6, 8)).want(public=5).run("enterprise", 6)
    assert said(fleet.step()) == [("start", "own, idle")] * 2


def test_an_idle_guarantee_hosts_who_asks_for_the_same_model_once_it_has_what_it_deserves() -> None:
    fleet = shared(public=(0, 2, 8), enterprise=(4, 6, 8)).want(public=7, enterprise=1).run("enterprise")
    fleet.settle(40)  # until it is known that the enterprise has nothing else in mind
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (4, 4)  # 3 of the 4 serve the public
    fleet.want(enterprise=4)
    assert said(fleet.step()) == []  # what was guaranteed is there, and loaded; there is nothing left to borrow
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (4, 4)


def test_a_guest_starts_no_more_than_it_lacks() -> None:
    fleet = shared(public=(0, 2, 8), enterprise=(6, 6, 8)).want(public=4, enterprise=0.9).run("enterprise")
    assert said(fleet.settle(40).step()) == []
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (2, 3)


def test_a_guarantee_that_another_model_may_need_hosts_nobody() -> None:
    fleet = Fleet((8,), {"public": (0, 2, 8), "enterprise": (6, 6, 8), "other": (0, 0, 8)})
    fleet.services.model[:], fleet.services.tenant[:] = (0, 0, 1), (0, 1, 1)
    fleet.want(public=4, enterprise=0.9, other=1).settle(40)
    assert fleet.gpus_of("public") == 2
    assert fleet.free_gpus.sum() == 4
    fleet.want(other=0).settle(80)  # five minutes later it is sure that nothing else is asked for
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (2, 3)


def test_what_was_taken_over_is_reclaimed_as_it_runs() -> None:
    fleet = shared(public=(0, 2, 8), enterprise=(0, 6, 8)).want(public=8, enterprise=0).run("public", 8)
    fleet.want(enterprise=6)
    assert said(fleet.step()) == [("take over", "reclaim")] * 6
    assert (fleet.gpus_of("public"), fleet.gpus_of("enterprise")) == (2, 6)
    assert said(fleet.step()) == []
