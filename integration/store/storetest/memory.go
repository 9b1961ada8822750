package storetest

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

// Memory is a store in this process's memory, for the tests of a store's users. The zero value is an empty store that works. It
// passes the suite; it may be used by several goroutines, inside testing/synctest too: it holds no lock while a hook runs.
type Memory struct {
	mu    sync.Mutex
	slots map[string]store.Slots
	calls []Call
	down  bool
	hook  func(ctx context.Context, c Call) Fate
}

var _ store.Store = (*Memory)(nil)

// Call is one call of a Memory.
type Call struct {
	Method     string // Stage, Promote, Get, Discard, Destroy or Writable
	Credential string
	Generation uint64      // of the key, Promote's `to`; 0 for Get and Writable
	Stage      store.Stage // of Get
}

// Fate is what a hook makes of a call.
type Fate int

const (
	Proceed    Fate = iota // the call happens
	FailBefore             // it fails with class Transient and has no effect
	LoseReply              // it has its effect, and fails with class Unsure
)

// SetDown makes every call fail with class Transient, until it is set to false.
func (m *Memory) SetDown(down bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = down
}

// SetHook makes f decide about every call; nil ends that. f may wait, also for ctx, or panic to end its goroutine's work.
func (m *Memory) SetHook(f func(ctx context.Context, c Call) Fate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = f
}

// Calls lists the calls so far, in the order in which they came.
func (m *Memory) Calls() []Call {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.calls)
}

// Slots is what the store holds of a credential, past all hooks.
func (m *Memory) Slots(credential string) store.Slots {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.slots[credential]
}

// SetSlots replaces what the store holds of a credential, as a foreign hand would.
func (m *Memory) SetSlots(credential string, s store.Slots) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.set(credential, s)
}

func (m *Memory) set(credential string, s store.Slots) {
	if m.slots == nil {
		m.slots = map[string]store.Slots{}
	}
	m.slots[credential] = s
}

var (
	errDown  = errors.New("the store is down")
	errReply = errors.New("the reply was lost")
)

// do records the call, lets the hook decide, and performs change under the lock.
func (m *Memory) do(ctx context.Context, c Call, change func(store.Slots) (store.Slots, error)) error {
	step := c.Method + " " + c.Credential
	m.mu.Lock()
	m.calls = append(m.calls, c)
	hook := m.hook
	m.mu.Unlock()
	fate := Proceed
	if hook != nil {
		fate = hook(ctx, c)
	}
	if err := store.CheckCredential(c.Credential); err != nil {
		return &rotators.Fault{Class: rotators.Refused, Step: step, Err: err}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return &rotators.Fault{Class: rotators.Transient, Step: step, Err: ctx.Err()}
	case m.down, fate == FailBefore:
		return &rotators.Fault{Class: rotators.Transient, Step: step, Err: errDown}
	}
	now, err := change(m.slots[c.Credential])
	if err != nil {
		return err
	}
	m.set(c.Credential, now)
	if fate == LoseReply {
		return &rotators.Fault{Class: rotators.Unsure, Step: step, Err: errReply}
	}
	return nil
}

// Stage implements [store.Store].
func (m *Memory) Stage(ctx context.Context, n store.Secret) (held store.Secret, err error) {
	err = m.do(ctx, Call{Method: "Stage", Credential: n.Key.Credential, Generation: n.Key.Generation}, func(s store.Slots) (store.Slots, error) {
		now, h, err := s.Stage(n)
		held = h
		return now, err
	})
	if err != nil {
		return store.Secret{}, err
	}
	return held, nil
}

// Promote implements [store.Store].
func (m *Memory) Promote(ctx context.Context, to, from store.Key) error {
	return m.do(ctx, Call{Method: "Promote", Credential: to.Credential, Generation: to.Generation}, func(s store.Slots) (store.Slots, error) {
		return s.Promote(to, from)
	})
}

// Get implements [store.Store].
func (m *Memory) Get(ctx context.Context, credential string, stage store.Stage) (found store.Secret, err error) {
	err = m.do(ctx, Call{Method: "Get", Credential: credential, Stage: stage}, func(s store.Slots) (store.Slots, error) {
		var err error
		found, err = s.At(credential, stage)
		return s, err
	})
	if err != nil {
		return store.Secret{}, err
	}
	return found, nil
}

// Discard implements [store.Store].
func (m *Memory) Discard(ctx context.Context, k store.Key) error {
	return m.do(ctx, Call{Method: "Discard", Credential: k.Credential, Generation: k.Generation}, func(s store.Slots) (store.Slots, error) {
		return s.Discard(k), nil
	})
}

// Destroy implements [store.Store].
func (m *Memory) Destroy(ctx context.Context, k store.Key) error {
	return m.do(ctx, Call{Method: "Destroy", Credential: k.Credential, Generation: k.Generation}, func(s store.Slots) (store.Slots, error) {
		return s.Destroy(k), nil
	})
}

// Writable implements [store.Store].
func (m *Memory) Writable(ctx context.Context, credential string) error {
	return m.do(ctx, Call{Method: "Writable", Credential: credential}, func(s store.Slots) (store.Slots, error) { return s, nil })
}

// Reference implements [store.Store].
func (m *Memory) Reference(credential string) string { return "memory:" + credential }

// Close does nothing: a Memory outlives its users.
func (m *Memory) Close() error { return nil }
