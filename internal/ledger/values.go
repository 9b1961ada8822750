package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// kvOperation marks a deleted key, as the KV API does.
const kvOperation = "KV-Operation"

// The codes that the server gives for a failed compare-and-set: on one server, and on a replicated stream.
const (
	codeWrongLast           = 10071
	codeWrongLastReplicated = 10164
)

// get reads the last value of a subject. A deleted one is ErrNotFound, with the marker's sequence.
func get[T any](ctx context.Context, l *Ledger, subject string) (T, uint64, error) {
	var v T
	m, err := l.last(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return v, 0, fmt.Errorf("%s: %w", subject, credential.ErrNotFound)
	}
	if err != nil {
		return v, 0, fmt.Errorf("read %s: %w", subject, err)
	}
	if m.Header.Get(kvOperation) != "" {
		return v, m.Sequence, fmt.Errorf("%s: deleted: %w", subject, credential.ErrNotFound)
	}
	if v, err = decode[T](m.Data); err != nil {
		return v, m.Sequence, fmt.Errorf("read %s: %w", subject, err)
	}
	return v, m.Sequence, nil
}

// last reads the last message of a subject. The request is bounded: it may be lost with the connection.
func (l *Ledger) last(ctx context.Context, subject string) (*jetstream.RawStreamMsg, error) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	return l.stream.GetLastMsgForSubject(ctx, subject)
}

// put writes a single value by compare-and-set: seq is the sequence of the one that it replaces, 0 if there must be none.
func (l *Ledger) put(ctx context.Context, subject string, v any, seq uint64) (uint64, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", subject, err)
	}
	next, err := l.set(ctx, &nats.Msg{Subject: subject, Data: data}, seq)
	if seq != 0 || !errors.Is(err, credential.ErrStale) {
		return next, err
	}
	// There must be none: a marker of an earlier deletion is none.
	if _, marker, gone := get[json.RawMessage](ctx, l, subject); marker != 0 && errors.Is(gone, credential.ErrNotFound) {
		return l.set(ctx, &nats.Msg{Subject: subject, Data: data}, marker)
	}
	return 0, err
}

// set publishes m by compare-and-set and names the outcome.
func (l *Ledger) set(ctx context.Context, m *nats.Msg, seq uint64) (uint64, error) {
	if m.Header == nil {
		m.Header = nats.Header{}
	}
	m.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(seq, 10))
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	ack, err := l.js.PublishMsg(ctx, m, jetstream.WithRetryAttempts(0))
	if err == nil {
		return ack.Sequence, nil
	}
	var api *jetstream.APIError
	switch {
	case errors.As(err, &api) && (api.ErrorCode == codeWrongLast || api.ErrorCode == codeWrongLastReplicated):
		return 0, fmt.Errorf("write %s: %w", m.Subject, credential.ErrStale)
	case errors.As(err, &api) && api.ErrorCode != codeStoreFailed, neverSent(err):
		return 0, fmt.Errorf("write %s: %w", m.Subject, err)
	default:
		return 0, fmt.Errorf("write %s: %w: %w", m.Subject, credential.ErrUncertain, err)
	}
}

// list reads every value below prefix, in the order in which they were written.
func list[T any](ctx context.Context, l *Ledger, prefix string) ([]T, error) {
	var order []string
	last := map[string]*T{}
	err := l.scan(ctx, scan{stream: LedgerStream, filter: prefix + ">", last: true}, func(m jetstream.Msg, _ *jetstream.MsgMetadata) error {
		subject := m.Subject()
		if last[subject] == nil {
			order = append(order, subject)
		}
		if m.Headers().Get(kvOperation) != "" {
			last[subject] = nil
			return nil
		}
		v, err := decode[T](m.Data())
		if err != nil {
			return fmt.Errorf("read %s: %w", subject, err)
		}
		last[subject] = &v
		return nil
	})
	if err != nil {
		return nil, err
	}
	vs := make([]T, 0, len(order))
	for _, subject := range order {
		if v := last[subject]; v != nil {
			vs = append(vs, *v)
			last[subject] = nil // a key that was deleted and made again is in order twice
		}
	}
	return vs, nil
}

// watch calls fn with each value below prefix (or of exactly this subject), then with every change; a nil value was deleted.
// ready is called once, after the values that existed. What cannot be read is logged and skipped. It ends with ctx only.
func watch[T any](ctx context.Context, l *Ledger, filter string, fn func(key string, v *T), ready func()) error {
	prefix := strings.TrimSuffix(filter, ">")
	return l.scan(ctx, scan{stream: LedgerStream, filter: filter, last: true, follow: true, ready: ready}, func(m jetstream.Msg, _ *jetstream.MsgMetadata) error {
		key := strings.TrimPrefix(m.Subject(), prefix)
		if m.Headers().Get(kvOperation) != "" {
			fn(key, nil)
			return nil
		}
		v, err := decode[T](m.Data())
		if err != nil {
			l.log.Error("ledger value skipped", "subject", m.Subject(), "error", err)
			return nil
		}
		fn(key, &v)
		return nil
	})
}

// checkToken refuses a name that would not be exactly one token of a subject.
func checkToken(what, name string) error {
	if !credential.ValidName(name) {
		return fmt.Errorf("%s %.80q: want 1 to 63 characters a-z 0-9 _ - that begins and ends with a letter or digit", what, name)
	}
	return nil
}
