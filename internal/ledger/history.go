package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
)

// Query selects events or audit entries. The zero value means everything that exists.
type Query struct {
	// Team and Name select credentials; empty means all.
	Team, Name string
	// Types selects events, by full type; empty means all. Audit entries have none.
	Types []string
	// After skips what is at or before this sequence; Since what is older.
	After uint64
	Since time.Time
	// Follow goes on with what comes later, until the context ends.
	Follow bool
}

// Validate refuses what would change the meaning of a subject.
func (q Query) Validate() error {
	var errs []error
	if q.Team != "" {
		errs = append(errs, checkToken("team", q.Team))
	}
	if q.Name != "" {
		errs = append(errs, checkToken("name", q.Name))
	}
	for _, kind := range q.Types {
		if !slices.Contains(events.Types(), kind) {
			errs = append(errs, fmt.Errorf("unknown event type %.80q", kind))
		}
	}
	return errors.Join(errs...)
}

// filter is the two last tokens of the subjects that q selects.
func (q Query) filter() string { return orDefault(q.Team, "*") + "." + orDefault(q.Name, "*") }

func (q Query) scan(stream, filter string) scan {
	s := scan{stream: stream, filter: filter, since: q.Since, follow: q.Follow}
	if q.After > 0 {
		s.from = q.After + 1
	}
	return s
}

// Events calls fn with each event that q selects, in the order of their commits. An error of fn ends it and is returned. What
// was committed a moment ago may be missing without Follow: see CatchUp.
func (l *Ledger) Events(ctx context.Context, q Query, fn func(events.Event) error) error {
	if err := q.Validate(); err != nil {
		return err
	}
	kind := "*"
	if len(q.Types) == 1 {
		kind = events.Short(q.Types[0])
	}
	return l.scan(ctx, q.scan(EventStream, events.SubjectPrefix+kind+"."+q.filter()), func(m jetstream.Msg, meta *jetstream.MsgMetadata) error {
		e, err := events.Decode(m.Headers(), m.Data())
		if err != nil {
			return fmt.Errorf("event %d of %s: %w", meta.Sequence.Stream, EventStream, err)
		}
		if len(q.Types) > 0 && !slices.Contains(q.Types, e.Type) {
			return nil
		}
		e.Sequence = meta.Sequence.Stream
		return fn(e)
	})
}

// Audit calls fn with each audit entry that q selects and its sequence, in the order of their commits; see Events.
func (l *Ledger) Audit(ctx context.Context, q Query, fn func(e credential.Entry, sequence uint64) error) error {
	if err := q.Validate(); err != nil {
		return err
	}
	return l.scan(ctx, q.scan(AuditStream, auditOutPrefix+q.filter()), func(m jetstream.Msg, meta *jetstream.MsgMetadata) error {
		e, err := decode[credential.Entry](m.Data())
		if err != nil {
			return fmt.Errorf("entry %d of %s: %w", meta.Sequence.Stream, AuditStream, err)
		}
		return fn(e, meta.Sequence.Stream)
	})
}
