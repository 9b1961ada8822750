// Package ledger is the truth: records, targets, incidents and the fleet's switch on one JetStream stream, with events, audit
// entries and schedules committed in the same atomic batch. It also holds the streams behind it and the embedded server.
package ledger

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Config says how a ledger is opened. Only Conn is required.
type Config struct {
	// Conn is used and never closed. It must be allowed every subject of its account.
	Conn *nats.Conn
	// Incarnation, if not zero, is the only one that Open accepts.
	Incarnation uuid.UUID
	// Replicas of every stream; 1 if zero. It counts only where Open creates them.
	Replicas int
	// Linger is how long a commit waits for others to share its batch; 1 ms if zero, not at all if negative.
	Linger time.Duration
	// Timeout bounds one batch from its first message to the answer; 5 s if zero.
	Timeout time.Duration
	// EventTTL is how long an event stays in the ledger itself, as the outbox of EventStream; 7 days if zero.
	EventTTL time.Duration
	// AuditTTL is the same for audit entries and AuditStream; 30 days if zero.
	AuditTTL time.Duration
	// Now is the clock of lag measurements and repaired schedules; time.Now if nil.
	Now func() time.Time
	// Logger receives what is repaired or retried in the background; discarded if nil.
	Logger *slog.Logger
	// Observer is told of every commit and batch; nil for none.
	Observer Observer
}

// Observer receives measurements. Its methods are called from several goroutines and must not block.
type Observer interface {
	// Committed is called once per Commit: the result is ok, stale, uncertain or refused.
	Committed(result string, took time.Duration)
	// Batched is called once per atomic batch that was sent, with how many transitions and messages it held.
	Batched(result string, transitions, messages int, took time.Duration)
}

func (c Config) withDefaults() Config {
	if c.Replicas == 0 {
		c.Replicas = 1
	}
	if c.Linger == 0 {
		c.Linger = time.Millisecond
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.EventTTL == 0 {
		c.EventTTL = 7 * 24 * time.Hour
	}
	if c.AuditTTL == 0 {
		c.AuditTTL = 30 * 24 * time.Hour
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Observer == nil {
		c.Observer = nobody{}
	}
	return c
}

type nobody struct{}

func (nobody) Committed(string, time.Duration)         {}
func (nobody) Batched(string, int, int, time.Duration) {}

// Ledger may be used by several goroutines. Its methods return errors that wrap credential.ErrStale, ErrUncertain,
// ErrNotFound or ErrSchema where those apply; any other error means that nothing was written.
type Ledger struct {
	cfg    Config
	nc     *nats.Conn
	js     jetstream.JetStream
	stream jetstream.Stream
	meta   meta
	log    *slog.Logger

	ackWait, inProgress time.Duration // constants, shorter in a test

	queue   chan *request
	stop    chan struct{} // closed by Close
	stopped chan struct{} // closed when the committer has ended
	once    sync.Once
}

// Open binds to the ledger behind cfg.Conn, or creates one if the account holds no stream of ours at all. It refuses a
// server older than 2.12, a ledger of another incarnation or a newer schema, and one that has lost its canary or a stream. A
// crash during the first Open leaves a ledger that the next Open completes.
func Open(ctx context.Context, cfg Config) (*Ledger, error) {
	if cfg.Conn == nil {
		return nil, errors.New("open ledger: no connection")
	}
	cfg = cfg.withDefaults()
	if err := checkServer(cfg.Conn); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	js, err := jetstream.New(cfg.Conn)
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	l := &Ledger{
		cfg: cfg, nc: cfg.Conn, js: js, log: cfg.Logger, ackWait: ackWait, inProgress: inProgressEvery,
		queue: make(chan *request, maxBatch), stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	if err := l.bind(ctx); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	go l.commitLoop()
	return l, nil
}

// Close stops accepting commits and waits for those that were accepted. Watches end with their contexts, not here.
func (l *Ledger) Close() {
	l.once.Do(func() { close(l.stop) })
	<-l.stopped
}

// Incarnation identifies this ledger since its creation. Ids of ops and events are derived from it.
func (l *Ledger) Incarnation() uuid.UUID { return l.meta.Incarnation }

// errClosed is what a commit after Close gets.
var errClosed = errors.New("the ledger is closed")

// checkID refuses an id that would change the depth or meaning of a subject.
func checkID(id credential.ID) error {
	_, err := credential.ParseID(string(id))
	return err
}
