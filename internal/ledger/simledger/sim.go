// Package simledger is a ledger in memory with the promises of the real one. It uses goroutines, channels and timers only, so
// that it can live in a testing/synctest bubble, and it can lose commits and replies on purpose.
package simledger

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// Fate is what becomes of one commit.
type Fate int

// The fates. Late is the worst of a real network: the caller is told that the outcome is unknown, reloads and sees nothing, and
// a second later the commit is written if its compare-and-set still holds.
const (
	Pass      Fate = iota // as it should be
	Lose                  // nothing is written; ErrUncertain
	LoseReply             // it is written; ErrUncertain
	Late                  // it is written a second later; ErrUncertain
	Stale                 // nothing is written; ErrStale
)

// Config of a simulated ledger; the zero value is useful.
type Config struct {
	// Incarnation; a fixed one if zero.
	Incarnation uuid.UUID
	// Now is the clock by which schedules ring; time.Now if nil, which is the bubble's clock in synctest. With another clock
	// call Wake after moving it.
	Now func() time.Time
	// Fate decides about each commit, before anything is looked at; nil lets all pass. It must not call the ledger.
	Fate func(r credential.Record) Fate
}

// Ledger is in memory. It outlives the schedulers and workers that use it, as a server would. Get, List, Commit and all the
// others mean what they mean for *ledger.Ledger.
type Ledger struct {
	cfg Config

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change
	seq     uint64
	cells   map[string]cell // what the stream holds, by subject
	entries []credential.Entry
	events  []events.Event
	due     *queue
	lanes   map[string]*queue
	acks    *queue
	rung    map[string]time.Time // when a doorbell was last rung, for the duplicate window
	ackBody map[uint64]ack
}

// cell is the last value of a subject.
type cell struct {
	seq  uint64
	data []byte // nil: deleted
}

type ack struct {
	id       credential.ID
	consumer string
	body     []byte
	at       time.Time
}

// New makes an empty ledger.
func New(cfg Config) *Ledger {
	if cfg.Incarnation == uuid.Nil {
		cfg.Incarnation = uuid.MustParse("5104ed6e-0000-4000-8000-000000000001")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Ledger{
		cfg: cfg, changed: make(chan struct{}), cells: map[string]cell{}, lanes: map[string]*queue{},
		due: &queue{limit: 1024}, acks: &queue{limit: 1024}, rung: map[string]time.Time{}, ackBody: map[uint64]ack{},
	}
}

// Incarnation identifies this ledger.
func (l *Ledger) Incarnation() uuid.UUID { return l.cfg.Incarnation }

// Wake makes everybody look at the clock again.
func (l *Ledger) Wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notify()
}

func (l *Ledger) notify() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// write stores a value whose compare-and-set held, with the lock held.
func (l *Ledger) write(subject string, data []byte) uint64 {
	l.seq++
	l.cells[subject] = cell{l.seq, data}
	l.notify()
	return l.seq
}

// Get loads a record and its sequence.
func (l *Ledger) Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error) {
	if _, err := credential.ParseID(string(id)); err != nil {
		return credential.Record{}, 0, err
	}
	r, seq, err := get[credential.Record](ctx, l, "record/"+string(id))
	if err == nil && r.Schema > credential.Schema {
		return credential.Record{}, seq, fmt.Errorf("read %s: %w", id, credential.ErrSchema)
	}
	return r, seq, err
}

// List reads every record; those of a newer schema are named in the error.
func (l *Ledger) List(ctx context.Context) ([]credential.Record, error) {
	all, err := list[credential.Record](ctx, l, "record/")
	if err != nil {
		return nil, err
	}
	var errs []error
	all = slices.DeleteFunc(all, func(r credential.Record) bool {
		if r.Schema > credential.Schema {
			errs = append(errs, fmt.Errorf("read %s: %w", r.ID, credential.ErrSchema))
			return true
		}
		return false
	})
	return all, errors.Join(errs...)
}

// Watch calls fn with every record and every later commit.
func (l *Ledger) Watch(ctx context.Context, fn func(credential.Record), ready func()) error {
	return watch(ctx, l, "record/", func(_ string, r *credential.Record) {
		if r != nil && r.Schema <= credential.Schema {
			fn(*r)
		}
	}, ready)
}

// Commit writes a record with its events, audit entry and schedule.
func (l *Ledger) Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	next, err := l.commit(ctx, r, seq)
	if err != nil {
		return 0, fmt.Errorf("commit %s: %w", r.ID, err)
	}
	return next, nil
}

func (l *Ledger) commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if _, err := credential.ParseID(string(r.ID)); err != nil {
		return 0, err
	}
	switch {
	case r.Schema != credential.Schema:
		return 0, fmt.Errorf("record has schema %d: %w", r.Schema, credential.ErrSchema)
	case r.Incarnation != l.cfg.Incarnation:
		return 0, fmt.Errorf("record is of incarnation %s, the ledger is %s", r.Incarnation, l.cfg.Incarnation)
	}
	if err := ledger.CheckCommit(r); err != nil {
		return 0, err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return 0, err
	}
	fate := Pass
	if l.cfg.Fate != nil {
		fate = l.cfg.Fate(r)
	}
	switch fate {
	case Lose:
		return 0, fmt.Errorf("lost on purpose: %w", credential.ErrUncertain)
	case Stale:
		return 0, fmt.Errorf("refused on purpose: %w", credential.ErrStale)
	case Late:
		time.AfterFunc(time.Second, func() { _, _ = l.store(r, data, seq) })
		return 0, fmt.Errorf("late on purpose: %w", credential.ErrUncertain)
	}
	next, err := l.store(r, data, seq)
	if fate == LoseReply && err == nil {
		return 0, fmt.Errorf("reply lost on purpose: %w", credential.ErrUncertain)
	}
	return next, err
}

func (l *Ledger) store(r credential.Record, data []byte, seq uint64) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cells["record/"+string(r.ID)].seq != seq {
		return 0, fmt.Errorf("sequence %d: %w", seq, credential.ErrStale)
	}
	var stored credential.Record // what a reader will see, sharing nothing with the caller's
	if err := json.Unmarshal(data, &stored); err != nil {
		return 0, err
	}
	for _, n := range stored.Announce {
		e := ledger.EventOf(stored, n)
		e.Sequence = uint64(len(l.events) + 1)
		l.events = append(l.events, e)
	}
	l.entries = append(l.entries, stored.Entry)
	l.setSchedule(stored)
	return l.write("record/"+string(r.ID), data), nil
}

// get reads a value; a deleted one is ErrNotFound.
func get[T any](ctx context.Context, l *Ledger, subject string) (T, uint64, error) {
	var v T
	if err := ctx.Err(); err != nil {
		return v, 0, err
	}
	l.mu.Lock()
	c := l.cells[subject]
	l.mu.Unlock()
	if c.data == nil {
		return v, c.seq, fmt.Errorf("%s: %w", subject, credential.ErrNotFound)
	}
	err := json.Unmarshal(c.data, &v)
	return v, c.seq, err
}

// put writes a value by compare-and-set, as the real one: 0 means that there is none.
func (l *Ledger) put(ctx context.Context, subject string, v any, seq uint64) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.cells[subject]; c.seq != seq && !(seq == 0 && c.data == nil) {
		return 0, fmt.Errorf("write %s: %w", subject, credential.ErrStale)
	}
	return l.write(subject, data), nil
}

// after lists what was written below prefix behind sequence seq, in order.
func (l *Ledger) after(prefix string, seq uint64) (keys []string, cells []cell) {
	for subject, c := range l.cells {
		if strings.HasPrefix(subject, prefix) && c.seq > seq {
			keys = append(keys, subject)
		}
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Compare(l.cells[a].seq, l.cells[b].seq) })
	for _, k := range keys {
		cells = append(cells, l.cells[k])
	}
	return keys, cells
}

func list[T any](ctx context.Context, l *Ledger, prefix string) ([]T, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	_, cells := l.after(prefix, 0)
	l.mu.Unlock()
	vs := []T{}
	for _, c := range cells {
		if c.data == nil {
			continue
		}
		var v T
		if err := json.Unmarshal(c.data, &v); err != nil {
			return nil, err
		}
		vs = append(vs, v)
	}
	return vs, nil
}

func watch[T any](ctx context.Context, l *Ledger, prefix string, fn func(key string, v *T), ready func()) error {
	var seen uint64
	for {
		l.mu.Lock()
		keys, cells := l.after(prefix, seen)
		changed := l.changed
		l.mu.Unlock()
		for i, c := range cells {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			key := strings.TrimPrefix(keys[i], prefix)
			seen = c.seq
			if c.data == nil {
				fn(key, nil)
				continue
			}
			var v T
			if err := json.Unmarshal(c.data, &v); err != nil {
				return err
			}
			fn(key, &v)
		}
		if ready != nil {
			ready()
			ready = nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
