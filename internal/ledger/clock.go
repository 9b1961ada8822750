package ledger

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// clockSubject holds the latest measurement; what it says does not matter, only when the server stored it.
const clockSubject = kv + "meta.clock"

const (
	clockEvery   = 30 * time.Second
	clockRounds  = 3
	clockGood    = 250 * time.Millisecond // a round trip that needs no second try
	clockStrange = 2 * time.Second        // an offset that an operator should hear of
)

// Clock is this process's clock, corrected to the ledger's server, so that deadlines are compared in one clock however the
// machines' clocks are set: a worker that is an hour ahead does not end an overlap an hour early.
type Clock struct {
	l      *Ledger
	offset atomic.Int64 // the server's time minus ours
}

// NewClock measures the offset once. It fails if the ledger cannot be written.
func NewClock(ctx context.Context, l *Ledger) (*Clock, error) {
	c := &Clock{l: l}
	return c, c.measure(ctx)
}

// Now is the server's time, as far as the last measurement tells: to within half a round trip.
func (c *Clock) Now() time.Time { return c.l.cfg.Now().Add(c.Offset()) }

// Offset is how far the server is ahead of this process.
func (c *Clock) Offset() time.Duration { return time.Duration(c.offset.Load()) }

// Run measures twice a minute until ctx ends. While the server does not answer, the last offset holds.
func (c *Clock) Run(ctx context.Context) error {
	ticker := time.NewTicker(clockEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := c.measure(ctx); err != nil && ctx.Err() == nil {
				c.l.log.Warn("the server's clock could not be read; the last offset holds", "error", err)
			}
		}
	}
}

// measure takes the round with the shortest way there and back.
func (c *Clock) measure(ctx context.Context) error {
	best := time.Duration(-1)
	var offset time.Duration
	var last error
	for range clockRounds {
		took, off, err := c.round(ctx)
		if err != nil {
			last = err
			continue
		}
		if best < 0 || took < best {
			best, offset = took, off
		}
		if best < clockGood {
			break
		}
	}
	if best < 0 {
		return fmt.Errorf("measure the server's clock: %w", last)
	}
	if d := offset.Abs(); d > clockStrange && (offset-c.Offset()).Abs() > clockStrange {
		c.l.log.Warn("this machine's clock differs from the NATS server's, whose time is used", "offset", offset.Round(time.Millisecond).String())
	}
	c.offset.Store(int64(offset))
	return nil
}

func (c *Clock) round(ctx context.Context) (took, offset time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.l.cfg.Timeout)
	defer cancel()
	before, mono := c.l.cfg.Now(), time.Now()
	ack, err := c.l.js.Publish(ctx, clockSubject, nil)
	took = time.Since(mono)
	if err != nil {
		return 0, 0, err
	}
	m, err := c.l.stream.GetMsg(ctx, ack.Sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, 0, errors.New("another process measured at the same time")
	}
	if err != nil {
		return 0, 0, err
	}
	return took, m.Time.Sub(before.Add(took / 2)), nil
}
