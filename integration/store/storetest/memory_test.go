package storetest

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rekeyhq/rekey/integration/store"
	"github.com/rekeyhq/rekey/rotators"
)

func memoryHarness() Harness {
	fates := map[string]Fate{"before": FailBefore, "after": LoseReply}
	return Harness{
		New: func(_ testing.TB, n int) []store.Store { return slices.Repeat([]store.Store{&Memory{}}, n) },
		Points: []string{
			"before", "after",
		},
		Dying: func(_ testing.TB, point string) (store.Store, func(), func() store.Store) {
			m := &Memory{}
			arm := func() {
				var armed atomic.Bool
				armed.Store(true)
				m.SetHook(func(_ context.Context, c Call) Fate {
					if c.Method != "Get" && armed.CompareAndSwap(true, false) { //nolint:usestdlibvars // the store's method
						return fates[point]
					}
					return Proceed
				})
			}
			return m, arm, func() store.Store { return m }
		},
	}
}

func TestMemory(t *testing.T) {
	if r := Run(t, memoryHarness()); len(r.Skipped) > 0 {
		t.Errorf("skipped %q", r.Skipped)
	}
}

func TestWhatAHarnessLacks(t *testing.T) {
	whole := memoryHarness()
	without := Harness{New: whole.New}
	for _, c := range Checks() {
		if why := whole.lacks(c); why != "" {
			t.Errorf("a whole harness: %s", why)
		}
		if why := without.lacks(c); (why != "") != c.Crash {
			t.Errorf("%s: %q", c.Name, why)
		}
	}
}

func TestMemoryDown(t *testing.T) {
	m := &Memory{}
	ctx := t.Context()
	rotated(ctx, m)
	m.SetDown(true)
	_, err := m.Get(ctx, id, store.Current)
	for _, err := range []error{err, m.Promote(ctx, key(1), key(2)), m.Writable(ctx, id), m.Destroy(ctx, key(1)), m.Discard(ctx, key(1))} {
		if err == nil || rotators.ClassOf(err) != rotators.Transient {
			t.Errorf("down: %v", err)
		}
	}
	m.SetDown(false)
	if err := on(ctx, m).holds(2, 0, 1).err; err != nil {
		t.Error(err)
	}
}

func TestMemoryFates(t *testing.T) {
	m := &Memory{}
	ctx := t.Context()
	fate := LoseReply
	m.SetHook(func(context.Context, Call) Fate { return fate })
	if _, err := m.Stage(ctx, secret(key(1))); rotators.ClassOf(err) != rotators.Unsure {
		t.Errorf("lost reply: %v", err)
	}
	fate = FailBefore
	if err := m.Promote(ctx, key(1), store.Key{}); rotators.ClassOf(err) != rotators.Transient {
		t.Errorf("failed before: %v", err)
	}
	m.SetHook(nil)
	if err := on(ctx, m).holds(0, 1, 0).err; err != nil {
		t.Error(err)
	}
	want := []Call{{"Stage", id, 1, ""}, {"Promote", id, 1, ""}}
	if got := m.Calls(); !slices.Equal(got[:2], want) {
		t.Errorf("calls %v", got)
	}
	m.SetSlots(id, store.Slots{})
	if s := m.Slots(id); s != (store.Slots{}) {
		t.Errorf("slots %v", s)
	}
}

// A hook may wait in a bubble's fake time, and the store can be used meanwhile.
func TestMemoryInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Memory{}
		m.SetHook(func(ctx context.Context, c Call) Fate {
			if c.Method == "Stage" {
				select {
				case <-time.After(time.Hour):
				case <-ctx.Done():
				}
			}
			return Proceed
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		go func() {
			if err := m.Writable(t.Context(), id); err != nil {
				t.Error(err)
			}
		}()
		if _, err := m.Stage(ctx, secret(key(1))); !errors.Is(err, context.DeadlineExceeded) || rotators.ClassOf(err) != rotators.Transient {
			t.Errorf("stage past its deadline: %v", err)
		}
		if _, err := m.Stage(t.Context(), secret(key(1))); err != nil {
			t.Error(err)
		}
	})
}
