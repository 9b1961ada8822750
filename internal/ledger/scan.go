package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// scan says what to read of a stream.
type scan struct {
	stream string
	filter string
	last   bool      // begin with the last message of each subject; of LedgerStream only
	from   uint64    // begin at this sequence; 0: at the first
	since  time.Time // begin at this time; zero: at the first
	follow bool      // go on with what is written later, until the context ends
	ready  func()    // called once, when everything that existed has been read

	// What existed at the start: the subjects of a scan of last messages, the last sequence of any other. The number of
	// pending messages that the server tells cannot be used for that: it reaches zero early while messages are replaced.
	begun   bool
	missing map[string]bool
	until   uint64
	looked  time.Time // when missing subjects were last looked for
}

// begin notes what exists.
func (s *scan) begin(ctx context.Context, l *Ledger) error {
	if s.begun || s.follow && s.ready == nil {
		return nil
	}
	if s.last {
		now, err := s.subjects(ctx, l)
		if err != nil {
			return err
		}
		s.missing = make(map[string]bool, len(now))
		for subject := range now {
			s.missing[subject] = true
		}
	} else {
		m, err := l.message(ctx, s.stream, map[string]any{"last_by_subj": s.filter})
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			return err
		}
		s.until = m.Seq
	}
	s.begun = true
	return nil
}

// subjects are those that exist.
func (s *scan) subjects(ctx context.Context, l *Ledger) (map[string]uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	info, err := l.stream.Info(ctx, jetstream.WithSubjectFilter(s.filter))
	if err != nil {
		return nil, err
	}
	return info.State.Subjects, nil
}

// complete reports whether everything that existed has been read, up to the message before s.from.
func (s *scan) complete() bool {
	return s.begun && len(s.missing) == 0 && (s.last || s.until == 0 || s.from > s.until)
}

// caughtUp reports whether to end, and says once that everything that existed has been read.
func (s *scan) caughtUp() bool {
	if s.complete() && s.ready != nil {
		s.ready()
		s.ready = nil
	}
	return s.complete() && !s.follow
}

// forget drops from missing what exists no longer: a schedule that rang or was cancelled will not be delivered.
func (s *scan) forget(ctx context.Context, l *Ledger) error {
	if s.looked = time.Now(); !s.begun {
		return nil
	}
	if len(s.missing) == 0 {
		return nil
	}
	now, err := s.subjects(ctx, l)
	if err != nil {
		return fmt.Errorf("look for what is missing: %w", err)
	}
	for subject := range s.missing {
		if _, ok := now[subject]; !ok {
			delete(s.missing, subject)
		}
	}
	return nil
}

// Every pull has a heartbeat and an expiry: without them pull consumers were seen to stall for 30 s.
const (
	pullHeartbeat = time.Second
	pullExpiry    = 4 * time.Second
	pullBatch     = 500
	rescanAfter   = 250 * time.Millisecond
	lookAfter     = 250 * time.Millisecond // between two looks for what is missing
	rescans       = 5                      // in a row without progress, unless following
)

// errGap means that a message of an ephemeral consumer did not arrive: the scan goes on behind the last one that did.
var errGap = errors.New("a delivery was lost")

// scan calls fn for each message in the stream's order, exactly once. Lost deliveries, reconnects and a restart of the server
// are healed by going on behind the last message. An error of fn ends it. A scan that follows returns ctx's error.
func (l *Ledger) scan(ctx context.Context, s scan, fn func(jetstream.Msg, *jetstream.MsgMetadata) error) error {
	failures := 0
	for {
		before := s.from
		done, err := l.scanOnce(ctx, &s, fn)
		switch {
		case done || ctx.Err() != nil:
			return errors.Join(err, ctx.Err())
		case s.from > before:
			failures = 0
		default:
			failures++
		}
		if failures >= rescans && !s.follow {
			return fmt.Errorf("read stream %s: %w", s.stream, err)
		}
		l.log.Warn("stream read again", "stream", s.stream, "filter", s.filter, "sequence", s.from, "error", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rescanAfter):
		}
	}
}

// scanOnce reads through one ephemeral consumer and moves s.from behind each message. done means not to go on.
func (l *Ledger) scanOnce(ctx context.Context, s *scan, fn func(jetstream.Msg, *jetstream.MsgMetadata) error) (done bool, err error) {
	if err := s.begin(ctx, l); err != nil {
		return false, fmt.Errorf("look at stream: %w", err)
	}
	if s.caughtUp() {
		return true, nil
	}
	cons, err := l.scanner(ctx, s)
	if err != nil {
		return false, fmt.Errorf("create consumer: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cfg.Timeout)
		defer cancel()
		_ = l.js.DeleteConsumer(ctx, s.stream, cons.CachedInfo().Name) // else the server does it after a minute
	}()
	if cons.CachedInfo().NumPending == 0 {
		s.until = 0 // what is there is older than s.since
		if err := s.forget(ctx, l); err != nil {
			return false, err
		}
		if s.caughtUp() {
			return true, nil
		}
	}
	expiry := pullExpiry
	if !s.follow {
		expiry = 2 * pullHeartbeat
	}
	var delivered uint64 // to this consumer
	for {
		batch, err := cons.Fetch(pullBatch, jetstream.FetchMaxWait(expiry), jetstream.FetchHeartbeat(pullHeartbeat))
		if err != nil {
			return false, fmt.Errorf("pull: %w", err)
		}
		before := delivered
		for more := true; more; {
			var m jetstream.Msg
			select {
			case m, more = <-batch.Messages():
			case <-ctx.Done():
				return true, nil
			}
			if !more {
				break
			}
			meta, err := m.Metadata()
			if err != nil {
				return false, err
			}
			if delivered++; meta.Sequence.Consumer != delivered {
				return false, errGap
			}
			if err := fn(m, meta); err != nil {
				return true, err
			}
			s.from = meta.Sequence.Stream + 1
			delete(s.missing, m.Subject())
			if meta.NumPending == 0 && len(s.missing) > 0 && time.Since(s.looked) > lookAfter {
				if err := s.forget(ctx, l); err != nil {
					return false, err
				}
			}
			if s.caughtUp() {
				return true, nil
			}
		}
		if err := batch.Error(); err != nil {
			return false, fmt.Errorf("pull: %w", err)
		}
		if delivered == before {
			if err := l.idle(ctx, s, cons, delivered); err != nil {
				return false, err
			}
			if s.caughtUp() {
				return true, nil
			}
		}
	}
}

// scanner makes the consumer that begins where s is.
func (l *Ledger) scanner(ctx context.Context, s *scan) (jetstream.Consumer, error) {
	cfg := jetstream.ConsumerConfig{
		FilterSubject: s.filter, AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1,
		InactiveThreshold: time.Minute, DeliverPolicy: jetstream.DeliverAllPolicy,
	}
	switch {
	case s.from > 0:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, s.from
	case s.last:
		cfg.DeliverPolicy = jetstream.DeliverLastPerSubjectPolicy
	case !s.since.IsZero():
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &s.since
	}
	ctx, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	return l.js.CreateConsumer(ctx, s.stream, cfg)
}

// idle looks, when nothing came for a while, whether something should have come.
func (l *Ledger) idle(ctx context.Context, s *scan, cons jetstream.Consumer, delivered uint64) error {
	look, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	info, err := cons.Info(look)
	if err != nil {
		return fmt.Errorf("look at consumer: %w", err)
	}
	if info.Delivered.Consumer != delivered {
		return errGap
	}
	if info.NumPending == 0 {
		s.until = 0 // the last one has expired
	}
	if err := s.forget(ctx, l); err != nil {
		return err
	}
	if len(s.missing) > 0 { // it exists and does not come
		s.from = 0
		return errGap
	}
	return nil
}
