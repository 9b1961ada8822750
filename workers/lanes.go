package workers

import (
	"context"
	"sync"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Queue is where doorbells come from: one lane of work and one of revocations per target, each with its own limit.
type Queue interface {
	// WatchTargets calls fn for every target that exists, that changes, and, with a nil target, that goes.
	WatchTargets(ctx context.Context, fn func(name string, t *credential.Target), ready func()) error
	// EnsureLanes makes a target's lanes if they are missing, with its limit.
	EnsureLanes(ctx context.Context, target string, concurrency int) error
	// Work calls fn for each doorbell of one lane, at most limit at once here, until ctx ends; what is in flight is finished.
	// An error of fn asks for another delivery.
	Work(ctx context.Context, lane credential.Lane, target string, limit int, fn func(context.Context, credential.Doorbell) error) error
}

// Serve answers the doorbells of every target until ctx ends. It returns nil once what was in flight is finished or handed
// back; it returns earlier only if the targets cannot be watched.
func (w *Worker) Serve(ctx context.Context, q Queue) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type served struct {
		limit int
		stop  context.CancelFunc
	}
	lanes := map[string]served{}
	return q.WatchTargets(ctx, func(name string, t *credential.Target) {
		was, known := lanes[name]
		if known && t != nil && was.limit == t.Concurrency {
			return
		}
		if known {
			was.stop()
			delete(lanes, name)
		}
		if t == nil {
			return
		}
		laneCtx, stop := context.WithCancel(ctx)
		lanes[name] = served{t.Concurrency, stop}
		for _, lane := range credential.Lanes() {
			wg.Go(func() { w.serveLane(laneCtx, q, lane, *t) })
		}
	}, nil)
}

// lanePause is the wait before a lane that ended is taken up again.
const lanePause = time.Second

// serveLane answers one lane until ctx ends. A lane that was lost, with its stream or by somebody's hand, is made anew.
func (w *Worker) serveLane(ctx context.Context, q Queue, lane credential.Lane, t credential.Target) {
	for {
		err := q.EnsureLanes(ctx, t.Name, t.Concurrency)
		if err == nil {
			err = q.Work(ctx, lane, t.Name, t.Concurrency, func(ctx context.Context, d credential.Doorbell) error { return w.Handle(ctx, d.ID) })
		}
		if ctx.Err() != nil {
			return
		}
		w.Logger.Error("lane ended; it is taken up again", "target", t.Name, "lane", string(lane), "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(lanePause):
		}
	}
}
