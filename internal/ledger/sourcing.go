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
)

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

// RestartSource repairs a sourced stream that has stopped following the ledger: its source is removed and added again, from
// behind the last message that arrived. Nothing is lost or doubled. If it is interrupted in between, the next Open completes
// it.
func (l *Ledger) RestartSource(ctx context.Context, stream string) error {
	cfg, ok := sourced(stream, 1)
	if !ok {
		return fmt.Errorf("restart source: %s is not a sourced stream", stream)
	}
	s, err := l.js.Stream(ctx, stream)
	if err != nil {
		return fmt.Errorf("restart source of %s: %w", stream, err)
	}
	now := s.CachedInfo().Config
	now.Sources = nil
	if _, err := l.js.UpdateStream(ctx, now); err != nil {
		return fmt.Errorf("remove source of %s: %w", stream, err)
	}
	return l.addSource(ctx, now, cfg.Sources[0])
}

// addSource adds the ledger as the source of a stream that has none, from behind the last message that arrived.
func (l *Ledger) addSource(ctx context.Context, cfg jetstream.StreamConfig, source *jetstream.StreamSource) error {
	arrived, err := l.lastSourced(ctx, cfg.Name)
	if err == nil {
		source.OptStartSeq = arrived + 1
		cfg.Sources = []*jetstream.StreamSource{source}
		cfg.Subjects = nil // the server made one up when there was no source
		_, err = l.js.UpdateStream(ctx, cfg)
	}
	if err != nil {
		return fmt.Errorf("add source of %s: %w", cfg.Name, err)
	}
	l.log.Info("source restarted", "stream", cfg.Name, "sequence", arrived+1)
	return nil
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
