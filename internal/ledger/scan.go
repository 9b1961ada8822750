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
	last   bool      // begin with the last message of each subject
	from   uint64    // begin at this sequence; 0: at the first
	since  time.Time // begin at this time; zero: at the first
	follow bool      // go on with what is written later, until the context ends
	ready  func()    // called once, when everything that existed has been read
}

// Every pull has a heartbeat and an expiry: without them pull consumers were seen to stall for 30 s.
const (
	pullHeartbeat = time.Second
	pullExpiry    = 4 * time.Second
	pullBatch     = 500
	rescanAfter   = 250 * time.Millisecond
	rescans       = 5 // in a row without progress, unless following
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
	create, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
	defer cancel()
	cons, err := l.js.CreateConsumer(create, s.stream, cfg)
	if err != nil {
		return false, fmt.Errorf("create consumer: %w", err)
	}
	info := cons.CachedInfo()
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cfg.Timeout)
		defer cancel()
		_ = l.js.DeleteConsumer(ctx, s.stream, info.Name) // else the server does it after a minute
	}()
	caughtUp := func() bool {
		if s.ready != nil {
			s.ready()
			s.ready = nil
		}
		return !s.follow
	}
	if info.NumPending == 0 && caughtUp() {
		return true, nil
	}
	expiry := pullExpiry
	if !s.follow {
		expiry = 2 * pullHeartbeat
	}
	var delivered uint64
	for {
		batch, err := cons.Fetch(pullBatch, jetstream.FetchMaxWait(expiry), jetstream.FetchHeartbeat(pullHeartbeat))
		if err != nil {
			return false, fmt.Errorf("pull: %w", err)
		}
		received := 0
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
			received++
			if delivered++; meta.Sequence.Consumer != delivered {
				return false, errGap
			}
			if err := fn(m, meta); err != nil {
				return true, err
			}
			s.from = meta.Sequence.Stream + 1
			if meta.NumPending == 0 && caughtUp() {
				return true, nil
			}
		}
		if err := batch.Error(); err != nil {
			return false, fmt.Errorf("pull: %w", err)
		}
		if received == 0 { // what was pending may have been replaced or expired
			look, cancel := context.WithTimeout(ctx, l.cfg.Timeout)
			info, err := cons.Info(look)
			cancel()
			if err != nil {
				return false, fmt.Errorf("look at consumer: %w", err)
			}
			if info.Delivered.Consumer != delivered {
				return false, errGap
			}
			if info.NumPending == 0 && caughtUp() {
				return true, nil
			}
		}
	}
}
