package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
)

// The headers that cancel a schedule; nats.go has names for the others.
const (
	headerScheduler    = "Nats-Scheduler"
	headerScheduleNext = "Nats-Schedule-Next"
	scheduleNextPurge  = "purge"
)

// request is one commit on its way through the committer.
type request struct {
	id    credential.ID
	seq   uint64
	msgs  []*nats.Msg // the record first
	bytes int
	state atomic.Int32
	done  chan result // of capacity 1
}

type result struct {
	seq uint64
	err error
}

// A request is waiting until the committer takes it or its caller gives up, whichever is first.
const (
	waiting int32 = iota
	taken
	givenUp
)

// Commit writes r, its events, its audit entry and its schedule, all or nothing, and returns the record's new sequence. seq is
// the sequence that r was loaded with, 0 for a record that must not exist yet. It blocks until the batch is durable.
//
// ErrStale: nothing was written, another commit came first. ErrUncertain: it may have been written, or may still be: reload.
// ErrSchema: r has another schema than this build's. Any other error: nothing was written. If ctx ends while the batch is
// under way the outcome is ErrUncertain.
func (l *Ledger) Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	start := time.Now()
	next, err := l.commit(ctx, r, seq)
	l.cfg.Observer.Committed(resultOf(err), time.Since(start))
	if err != nil {
		return 0, fmt.Errorf("commit %s: %w", r.ID, err)
	}
	return next, nil
}

// resultOf is the word under which an outcome is counted.
func resultOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, credential.ErrStale):
		return "stale"
	case errors.Is(err, credential.ErrUncertain):
		return "uncertain"
	default:
		return "refused"
	}
}

func (l *Ledger) commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	msgs, err := l.messages(r, seq)
	if err != nil {
		return 0, err
	}
	q := &request{id: r.ID, seq: seq, msgs: msgs, done: make(chan result, 1)}
	for _, m := range msgs {
		size := m.Size()
		if limit := l.nc.MaxPayload(); limit > 0 && int64(size) > limit-headroom {
			return 0, fmt.Errorf("message of %d bytes on %s: the server takes %d", size, m.Subject, limit)
		}
		q.bytes += size
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	select {
	case <-l.stop:
		return 0, errClosed
	default:
	}
	select {
	case l.queue <- q:
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-l.stop:
		return 0, errClosed
	}
	select {
	case res := <-q.done:
		return res.seq, res.err
	case <-ctx.Done():
		if q.state.CompareAndSwap(waiting, givenUp) {
			return 0, ctx.Err()
		}
		return 0, fmt.Errorf("%w: %w", credential.ErrUncertain, ctx.Err())
	case <-l.stopped:
		select {
		case res := <-q.done:
			return res.seq, res.err
		default:
			return 0, errClosed // it came too late to be taken
		}
	}
}

// check refuses a record that Next cannot have made for this ledger.
func (l *Ledger) check(r credential.Record) error {
	if err := checkID(r.ID); err != nil {
		return err
	}
	switch {
	case r.Schema != credential.Schema:
		return fmt.Errorf("record has schema %d, this build writes %d: %w", r.Schema, credential.Schema, credential.ErrSchema)
	case r.Incarnation != l.meta.Incarnation:
		return fmt.Errorf("record is of incarnation %s, the ledger is %s", r.Incarnation, l.meta.Incarnation)
	}
	return CheckCommit(r)
}

// CheckCommit refuses a record whose commit would break the chain of audit entries or publish an event under two ids.
func CheckCommit(r credential.Record) error {
	switch {
	case r.Rev < 1:
		return errors.New("record has no rev")
	case r.Entry.Credential != r.ID || r.Entry.Rev != r.Rev:
		return fmt.Errorf("audit entry is for %s rev %d, the record is %s rev %d", r.Entry.Credential, r.Entry.Rev, r.ID, r.Rev)
	case r.Entry.Hash != r.Entry.Sum():
		return fmt.Errorf("audit entry of rev %d does not match its hash", r.Rev)
	case r.Entry.At.IsZero():
		return fmt.Errorf("audit entry of rev %d has no time", r.Rev)
	}
	seen := map[string]bool{}
	for _, n := range r.Announce {
		if seen[n.Type] {
			return fmt.Errorf("record announces %s twice in rev %d", n.Type, r.Rev)
		}
		seen[n.Type] = true
	}
	return nil
}

// EventOf is the event that notice n of r's commit becomes.
func EventOf(r credential.Record, n credential.Notice) events.Event {
	kind := events.TypeOf(n.Type)
	return events.Event{
		ID: events.NewID(r.Incarnation, string(r.ID), r.Rev, kind), Type: kind, Source: Source(r.Incarnation),
		Subject: string(r.ID), Time: r.Entry.At,
		Data: events.Data{
			Credential: string(r.ID), Generation: n.Generation, Epoch: r.Epoch, Rev: r.Rev,
			Owner: r.Spec.Owner, Environment: r.Spec.Environment,
			Store: r.Spec.Store, Reference: r.Spec.Store + ":" + string(r.ID),
			Reason: n.Reason, Message: n.Message, ValidUntil: n.ValidUntil, GapSeconds: n.Gap.D().Seconds(), Grade: n.Grade, Lagging: n.Lagging,
		},
	}
}

// Source is the CloudEvents source of a ledger.
func Source(incarnation uuid.UUID) string { return "/rekey/" + incarnation.String() }

// messages builds what one commit writes: the record first, so that a stale one fails before anything else is looked at.
func (l *Ledger) messages(r credential.Record, seq uint64) ([]*nats.Msg, error) {
	if err := l.check(r); err != nil {
		return nil, err
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	record := nats.NewMsg(recordSubject(r.ID))
	record.Data = body
	record.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(seq, 10))
	msgs := []*nats.Msg{record}

	for _, n := range r.Announce {
		e := EventOf(r, n)
		h, data, err := events.Encode(e)
		if err != nil {
			return nil, err
		}
		h.Set(jetstream.MsgIDHeader, e.ID)
		h.Set(jetstream.MsgTTLHeader, l.cfg.EventTTL.String())
		msgs = append(msgs, &nats.Msg{Subject: eventSubject(e.Type, r.ID, r.Rev), Header: h, Data: data})
	}

	entry, err := json.Marshal(r.Entry)
	if err != nil {
		return nil, err
	}
	audit := nats.NewMsg(auditSubject(r.ID, r.Rev))
	audit.Data = entry
	audit.Header.Set(jetstream.MsgTTLHeader, l.cfg.AuditTTL.String())
	msgs = append(msgs, audit)

	if r.Due.IsZero() {
		record.Header.Set(headerScheduler, scheduleSubject(r.ID))
		record.Header.Set(headerScheduleNext, scheduleNextPurge)
	} else {
		msgs = append(msgs, scheduleMessage(r))
	}
	return msgs, nil
}

// scheduleMessage rings due.<id> at r.Due. The header is written by hand: nats.go's WithScheduleAt drops sub-seconds, and
// would ring early.
func scheduleMessage(r credential.Record) *nats.Msg {
	m := nats.NewMsg(scheduleSubject(r.ID))
	m.Data = []byte(strconv.FormatUint(r.Rev, 10))
	m.Header.Set(jetstream.ScheduleHeader, "@at "+r.Due.UTC().Format(time.RFC3339Nano))
	m.Header.Set(jetstream.ScheduleTargetHeader, dueSubject(r.ID))
	return m
}
