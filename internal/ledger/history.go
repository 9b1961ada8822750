package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
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

// Lag is how far a sourced stream is behind the ledger.
type Lag struct {
	Stream string `json:"stream"`
	// Behind is the age of the oldest commit that has not arrived there; 0 if everything has.
	Behind time.Duration `json:"behind"`
}

// LagAlarm is the lag from which a sourced stream has to be looked at: it may be wedged (nats-server #8323).
const LagAlarm = time.Minute

// SourceLag measures how far the event and audit streams are behind the ledger.
func (l *Ledger) SourceLag(ctx context.Context) ([]Lag, error) {
	var lags []Lag
	for _, s := range []struct{ stream, from string }{{EventStream, eventPrefix + ">"}, {AuditStream, auditPrefix + ">"}} {
		behind, err := l.behind(ctx, s.stream, s.from)
		if err != nil {
			return nil, fmt.Errorf("measure lag of %s: %w", s.stream, err)
		}
		lags = append(lags, Lag{Stream: s.stream, Behind: behind})
	}
	return lags, nil
}

// behind is the age of the first message of the ledger on filter that is not yet in stream.
func (l *Ledger) behind(ctx context.Context, stream, filter string) (time.Duration, error) {
	arrived, err := l.lastSourced(ctx, stream)
	if err != nil {
		return 0, err
	}
	m, err := l.message(ctx, LedgerStream, map[string]any{"seq": arrived + 1, "next_by_subj": filter})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return max(l.cfg.Now().Sub(m.Time), time.Nanosecond), nil
}

// lastSourced is the ledger's sequence of the last message that has arrived in stream, 0 if none has.
func (l *Ledger) lastSourced(ctx context.Context, stream string) (uint64, error) {
	m, err := l.message(ctx, stream, map[string]any{"last_by_subj": ">"})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(m.header("Nats-Stream-Source")) // stream, sequence, filter, …
	if len(fields) < 2 {
		return 0, fmt.Errorf("message %d does not say where it comes from", m.Seq)
	}
	return strconv.ParseUint(fields[1], 10, 64)
}

// CatchUp waits until everything that was committed before the call is in the event and audit streams, or ctx ends.
func (l *Ledger) CatchUp(ctx context.Context) error {
	for {
		lags, err := l.SourceLag(ctx)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(lags, func(g Lag) bool { return g.Behind > 0 }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", lags[0].Stream, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stored is a message as the server's message API gives it.
type stored struct {
	Subject string    `json:"subject"`
	Seq     uint64    `json:"seq"`
	Header  []byte    `json:"hdrs"`
	Data    []byte    `json:"data"`
	Time    time.Time `json:"time"`
}

func (s stored) header(name string) string {
	for line := range strings.SplitSeq(string(s.Header), "\r\n") {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.EqualFold(k, name) {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// message asks the stream's leader for one message; nats.go offers neither "next on subject" nor wildcards.
func (l *Ledger) message(ctx context.Context, stream string, query map[string]any) (stored, error) {
	body, err := json.Marshal(query)
	if err != nil {
		return stored{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	reply, err := l.nc.RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET."+stream, body)
	if err != nil {
		return stored{}, err
	}
	answer, err := decode[struct {
		Message stored              `json:"message"`
		Error   *jetstream.APIError `json:"error"`
	}](reply.Data)
	switch {
	case err != nil:
		return stored{}, err
	case answer.Error != nil && answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return stored{}, jetstream.ErrMsgNotFound
	case answer.Error != nil:
		return stored{}, answer.Error
	}
	return answer.Message, nil
}
