package rotatortest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rekeyhq/rekey/rotators"
)

// The methods of a Rotator that reach the issuer.
const (
	Apply   = "apply"
	Prove   = "prove"
	Disable = "disable"
	Enable  = "enable"
	Delete  = "delete"
	Inspect = "inspect"
)

// Call is one call of a rotator on its way to a fake issuer.
type Call struct {
	Method string
	Op     rotators.Op        // zero for Inspect
	ID     rotators.VersionID // empty for a minting Apply and for Inspect
}

func (c Call) step() string { return fmt.Sprintf("%s %q", c.Method, c.ID) }

func (c Call) changes() bool { return c.Method != Prove && c.Method != Inspect }

// Wire is what lies between a rotator and a fake issuer, and what can go wrong there. The zero value is a sound one.
// Before and After must be set before the first call; the methods may be called at any time.
type Wire struct {
	// Before is asked when a call sets out. It may block, as a frozen worker would; its error is returned and nothing
	// has happened.
	Before func(context.Context, Call) error
	// After is asked when a call has taken effect. Its error is returned instead of the reply.
	After func(context.Context, Call) error

	mu     sync.Mutex
	cut    bool
	losses []loss
}

// loss is a plan for the next call of one method, or for the next change if that is empty.
type loss struct {
	method string
	reply  bool
}

var errUnreachable = errors.New("the issuer is unreachable")

// Cut makes every call fail without an effect until Mend.
func (w *Wire) Cut() { w.set(true) }

// Mend undoes Cut.
func (w *Wire) Mend() { w.set(false) }

func (w *Wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
}

// LoseReply lets the next call of method take effect and answers Unsure; an empty method means the next change.
func (w *Wire) LoseReply(method string) { w.plan(loss{method, true}) }

// LoseRequest keeps the next call of method from taking effect and answers Transient; an empty method means the next change.
func (w *Wire) LoseRequest(method string) { w.plan(loss{method, false}) }

func (w *Wire) plan(l loss) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.losses = append(w.losses, l)
}

// take removes the first planned loss of this kind that fits c.
func (w *Wire) take(c Call, reply bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, l := range w.losses {
		if l.reply == reply && (l.method == c.Method || l.method == "" && c.changes()) {
			w.losses = append(w.losses[:i:i], w.losses[i+1:]...)
			return true
		}
	}
	return false
}

// send is the way to the issuer.
func (w *Wire) send(ctx context.Context, c Call) error {
	if w.Before != nil {
		if err := w.Before(ctx, c); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return rotators.Faultf(rotators.Transient, c.step(), "%w", err)
	}
	w.mu.Lock()
	cut := w.cut
	w.mu.Unlock()
	if cut || w.take(c, false) {
		return rotators.Faultf(rotators.Transient, c.step(), "%w", errUnreachable)
	}
	return nil
}

// reply is the way back. An error of the issuer itself travels like any other answer.
func (w *Wire) reply(ctx context.Context, c Call, err error) error {
	if w.take(c, true) {
		err = rotators.Faultf(rotators.Unsure, c.step(), "the reply was lost")
	}
	if w.After != nil {
		if lost := w.After(ctx, c); lost != nil {
			err = lost
		}
	}
	return err
}

// FakeSession is a consumer's login at a fake issuer.
type FakeSession struct {
	mu    sync.Mutex
	ended bool
}

// Alive reports whether neither side has ended it.
func (s *FakeSession) Alive() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended
}

// Close ends it.
func (s *FakeSession) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
}

func clock(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}
