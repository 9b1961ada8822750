package workers

import (
	"context"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Orders is where emergency orders and the fleet's switch come from.
type Orders interface {
	WatchIncidents(ctx context.Context, fn func(credential.Incident), ready func()) error
	WatchControl(ctx context.Context, fn func(credential.Control), ready func()) error
}

// Guard knows, in memory, every emergency order that has not reached all its records, and the fleet-wide pause. A worker asks
// it before each effect. The zero value is ready for Watch, and forbids everything until Watch has seen what is there.
type Guard struct {
	mu     sync.Mutex
	open   map[string]credential.Incident
	paused bool
	seen   int // watches that are up to date
}

// Watch keeps g current until ctx ends. ready is called once, when g may be relied on.
func (g *Guard) Watch(ctx context.Context, o Orders, ready func()) error {
	primed := func() {
		g.mu.Lock()
		g.seen++
		all := g.seen == 2
		g.mu.Unlock()
		if all && ready != nil {
			ready()
		}
	}
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return o.WatchIncidents(ctx, g.order, primed) })
	eg.Go(func() error { return o.WatchControl(ctx, g.control, primed) })
	return eg.Wait()
}

func (g *Guard) order(i credential.Incident) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i.Expanded {
		delete(g.open, i.ID)
		return
	}
	if g.open == nil {
		g.open = map[string]credential.Incident{}
	}
	g.open[i.ID] = i
}

func (g *Guard) control(c credential.Control) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.paused = c.Paused
}

// Blocked reports an open order for r that r does not carry yet.
func (g *Guard) Blocked(r credential.Record) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, i := range g.open {
		if !r.Ordered(i.ID) && slices.Contains(i.Credentials, r.ID) {
			return true
		}
	}
	return g.seen < 2
}

// Paused reports the fleet-wide pause.
func (g *Guard) Paused() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.paused
}
