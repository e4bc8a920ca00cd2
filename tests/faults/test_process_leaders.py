"""Two leaders at once: the old one stands still past its lease, another leads, the old one goes on. Triggers note whose upkeep changed
what, and who led then."""

from __future__ import annotations

from typing import Any, Final

from psycopg.conninfo import make_conninfo

from tests.support.faults.load import Arrivals
from tests.support.faults.processes import WorkerProcess
from tests.support.faults.trials import Trial, Trials
from tests.support.lab import Lab
from tests.support.waiting import wait_until

#: What only a leader does: opens and empties leaves, promotes, declares dead, rescues, forgets. And each end of a task, since leaves
#: are emptied meanwhile.
_NOTES: Final = """
CREATE TABLE upkeep (what text NOT NULL, who int NOT NULL, leader_pid int, term bigint);
CREATE FUNCTION note_upkeep() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO upkeep
    SELECT TG_ARGV[0], coalesce(current_setting('fastq_test.who', true), '0')::int, c.pid, l.term
      FROM leader l LEFT JOIN consumer c ON c.id = l.holder;
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON leaf FOR EACH ROW EXECUTE FUNCTION note_upkeep('leaf');
CREATE TRIGGER note AFTER DELETE ON delayed FOR EACH ROW EXECUTE FUNCTION note_upkeep('promoted');
CREATE TRIGGER note_dead AFTER UPDATE ON consumer FOR EACH ROW
    WHEN (NEW.dead_at IS NOT NULL AND OLD.dead_at IS NULL AND NOT NEW.stopping) EXECUTE FUNCTION note_upkeep('declared dead');
CREATE TRIGGER note_forgotten AFTER DELETE ON consumer FOR EACH ROW
    WHEN (OLD.dead_at IS NOT NULL) EXECUTE FUNCTION note_upkeep('forgotten');
CREATE TRIGGER note_rescued AFTER INSERT ON attempt_error FOR EACH ROW
    WHEN (NEW.error LIKE 'the worker was lost%') EXECUTE FUNCTION note_upkeep('rescued');

-- Statements of upkeep, whatever they found to do. Those of the first worker that promote wait here while the test holds the lock.
CREATE TABLE asked (who int NOT NULL, leader_pid int);
CREATE FUNCTION note_asked() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    who int := coalesce(current_setting('fastq_test.who', true), '0')::int;
BEGIN
    IF who = 1 AND TG_ARGV[0] = 'promote' THEN
        PERFORM pg_advisory_xact_lock_shared(TG_RELID::bigint);
    END IF;
    INSERT INTO asked SELECT who, c.pid FROM leader l LEFT JOIN consumer c ON c.id = l.holder;
    RETURN NULL;
END $$;
CREATE TRIGGER note_asked BEFORE UPDATE ON leaf FOR EACH STATEMENT EXECUTE FUNCTION note_asked('turn leaves over');
CREATE TRIGGER note_asked BEFORE DELETE ON delayed FOR EACH STATEMENT EXECUTE FUNCTION note_asked('promote');

CREATE TABLE ended (id bigint NOT NULL);
CREATE FUNCTION note_end() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO ended SELECT i FROM unnest(NEW.ids) r, generate_series(lower(r), upper(r) - 1) i;
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT ON done FOR EACH ROW EXECUTE FUNCTION note_end();
"""
#: Seconds; short, so that leaves are opened and emptied all the time.
_RETENTION: Final = 2.0
#: Trials of which some put the old leader to the test.
_MANY: Final = 8


def test_upkeep_of_a_leader_that_was_stopped_past_its_lease_changes_nothing(trials: Trials, repeats: int) -> None:
    sent: list[float] = []

    def trial(trial: Trial) -> float:
        sent.append(_two_leaders(trial))
        return sent[-1]

    trials.run("two leaders: the old one's statements of its term, which changed nothing", trial, unit="statements")
    # In a single one it may have learnt of its end first: a heartbeat was due.
    assert repeats < _MANY or sum(late > 0 for late in sent) >= repeats / 4, f"the old leaders sent too little: {sent}"


def _two_leaders(trial: Trial) -> float:
    lab, pace, rnd = trial.lab, trial.pace, trial.rnd
    lab.db.execute(_NOTES)
    gate = lab.gate()
    # One in four stands still at any moment, which is seldom one between two statements of a tick, and at the defaults, where a
    # connection that was silent for so long is given up. The others are patient: they go on where they stood still.
    is_amid = trial.number % 4 != 3
    patience: dict[str, Any] = {"dead_after": 300.0, "statement_timeout": 120.0} if is_amid else {}
    old = _worker(lab, 1, **patience)
    lab.wait_until_leads(pid=old.pid)
    new = _worker(lab, 2)
    lab.consumer_id(pid=new.pid)
    victim = _worker(lab, 3, types={"held": None})
    held = lab.enqueue_type("held", *[gate.orders] * 5)
    lab.wait_for_beat(lab.consumer_id(pid=victim.pid), running=held)
    # Tasks come due all the time, and leaves turn over: at every moment there is upkeep to do.
    with Arrivals(lab, lambda _: None, delay=(0.1, 2.0), seed=trial.number) as arrivals:
        wait_until(lambda: _upkeep_by(lab, 1) >= {"leaf", "promoted"}, timeout=20, message="upkeep by the first")
        victim.kill()
        arrivals.wait_for(rnd.randrange(1, 200))
        if is_amid:
            _freeze_amid_its_duties(lab, old)
        else:
            old.freeze()
        lab.wait_until_leads(pid=new.pid)
        # It comes back as one that is alive, or as one that was declared dead.
        wanted = {"leaf", "promoted"} | ({"declared dead", "rescued"} if trial.number % 2 else set())
        wait_until(lambda: _upkeep_by(lab, 2) >= wanted, timeout=4 * pace.dead_after, message="upkeep by the second")
        told = old.log.count("leads no more")
        old.thaw()
        wait_until(lambda: old.log.count("leads no more") > told, message="the first to hear that it leads no more")
        arrivals.wait_for(300)
        wait_until(
            lambda: _upkeep_by(lab, 2) >= {"leaf", "promoted", "declared dead", "rescued"},
            timeout=4 * pace.dead_after,
            message="the rescue by the second",
        )
        ids = [*arrivals.stop(), *held]
    gate.open()
    # Somebody who has a handler for what the victim held.
    _worker(lab, 4, types={"held": None})
    wait_until(
        lambda: lab.value("SELECT count(DISTINCT id) FROM ended") == len(ids),
        timeout=4 * pace.dead_after,
        message="the end of all that came",
    )
    assert lab.value("SELECT count(*) FROM ended") == len(ids), "a task ended twice"
    pids = {1: old.pid, 2: new.pid, 3: victim.pid}
    changes = lab.all("SELECT what, who, leader_pid, term, count(*) FROM upkeep GROUP BY 1, 2, 3, 4 ORDER BY 4, 1")
    wrong = [change for change in changes if pids.get(change[1]) != change[2]]
    assert not wrong, f"upkeep by another than the leader: {wrong}"
    # The terms of both are on record: the old one's end where the new one's begin.
    terms = sorted({(term, who) for _, who, _, term, _ in changes})
    # A lease of a second may lapse on a busy machine, and is taken again.
    assert {who for _, who in terms} == {1, 2}
    assert [who for _, who in terms] == sorted(who for _, who in terms), terms
    late: int = lab.value("SELECT count(*) FROM asked WHERE who = 1 AND leader_pid = %s", new.pid)
    return float(late)


def _freeze_amid_its_duties(lab: Lab, leader: WorkerProcess) -> None:
    """Stops it while it waits for the answer to one of a tick's statements: those that come next it sends when it goes on, in the same
    term. The one that it waits for ends before anybody else leads."""
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 'delayed'::regclass AND pid <> pg_backend_pid()"
    lab.db.execute("SELECT pg_advisory_lock('delayed'::regclass::oid::bigint)")
    wait_until(lambda: lab.value(locks) > 0, message="the leader to promote")
    leader.freeze()
    lab.db.execute("SELECT pg_advisory_unlock('delayed'::regclass::oid::bigint)")
    wait_until(lambda: lab.value(locks) == 0, message="the end of that statement")


def _worker(lab: Lab, who: int, **options: Any) -> WorkerProcess:
    dsn = make_conninfo(lab.dsn, options=f"-c fastq_test.who={who}")
    return lab.worker(dsn=dsn, completed_retention=_RETENTION, **options)


def _upkeep_by(lab: Lab, who: int) -> set[str]:
    return {what for (what,) in lab.all("SELECT DISTINCT what FROM upkeep WHERE who = %s", who)}
