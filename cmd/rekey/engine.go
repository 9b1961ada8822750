package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/rotators"
	"github.com/rekeyhq/rekey/scheduler"
	"github.com/rekeyhq/rekey/workers"
)

// roles are the parts of the engine that one process runs.
type roles struct{ api, scheduler, worker bool }

func (r roles) String() string {
	var names []string
	for _, p := range []struct {
		on   bool
		name string
	}{{r.api, "api"}, {r.scheduler, "scheduler"}, {r.worker, "worker"}} {
		if p.on {
			names = append(names, p.name)
		}
	}
	return strings.Join(names, ", ")
}

// engine is one process: what it opened, in the order in which it is closed again.
type engine struct {
	cfg     config.Config
	roles   roles
	log     *slog.Logger
	nc      *nats.Conn
	node    *ledger.Embedded // nil with an external NATS
	ledger  *ledger.Ledger
	clock   *ledger.Clock // the ledger's, so that all processes compare deadlines in one
	stores  *openStores
	metrics *api.Metrics
	closers []func() error
}

// run starts the roles and works until ctx ends. Then nothing new is started, what is in flight is finished, and everything is
// closed in reverse order. A crash instead loses nothing: every step was committed before and after.
func (e *engine) run(ctx context.Context) (err error) {
	defer func() {
		for i := len(e.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, e.closers[i]())
		}
	}()
	if err := e.open(ctx); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	guard := &workers.Guard{}
	ready := make(chan struct{})
	g.Go(func() error { return ended(gctx, guard.Watch(gctx, e.ledger, func() { close(ready) })) })
	select {
	case <-ready:
	case <-gctx.Done():
		return g.Wait()
	}
	if e.node != nil {
		g.Go(func() error { return e.watchNode(gctx) })
	}
	g.Go(func() error { return e.clock.Run(gctx) })
	if e.roles.api {
		if err := e.serveAPI(gctx, g); err != nil {
			g.Go(func() error { return err })
			return g.Wait()
		}
	}
	if e.roles.scheduler {
		s := scheduler.New(scheduler.Config{Ledger: e.ledger, Name: "scheduler " + processName(), Now: e.clock.Now, Logger: e.log})
		g.Go(func() error { return s.Run(gctx) })
	}
	if e.roles.worker {
		w := e.worker(guard)
		g.Go(func() error { return ended(gctx, w.Serve(gctx, e.ledger)) })
	}
	e.log.Info("ready", "roles", e.roles.String())
	return g.Wait()
}

// ended drops the error that only says that the process is stopping.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// processName tells processes apart in claims and audit entries.
func processName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return fmt.Sprintf("%s/%d/%s", host, os.Getpid(), uuid.NewString()[:8])
}

func (e *engine) open(ctx context.Context) error {
	if err := e.connect(ctx); err != nil {
		return err
	}
	e.metrics = api.NewMetrics()
	l, err := ledger.Open(ctx, ledger.Config{Conn: e.nc, Replicas: e.cfg.NATS.Replicas, Logger: e.log, Observer: e.metrics})
	if err != nil {
		return err
	}
	e.ledger = l
	e.closers = append(e.closers, func() error { l.Close(); return nil })
	if e.clock, err = ledger.NewClock(ctx, l); err != nil {
		return err
	}
	e.stores = &openStores{configured: e.cfg.Stores}
	e.closers = append(e.closers, e.stores.close)
	if !e.roles.worker {
		return nil
	}
	for name := range e.cfg.Stores { // a store that cannot be opened is found now, not at the first rotation
		if _, err := e.stores.get(name); err != nil {
			return fmt.Errorf("store %s: %w", name, err)
		}
	}
	return nil
}

// connect starts the embedded server, or connects to the configured one.
func (e *engine) connect(ctx context.Context) error {
	if e.cfg.NATS.URL == "" {
		if !e.roles.api {
			return errors.New("nats.url is not set: a scheduler or worker of its own needs an external NATS that all processes share; `rekey server` runs everything on an embedded one")
		}
		node, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: e.cfg.Server.DataDir, Port: e.cfg.NATS.Port, Logger: e.log})
		if err != nil {
			return err
		}
		e.node = node
		e.closers = append(e.closers, func() error { node.Shutdown(); return nil })
		if e.nc, err = node.Connect(); err != nil {
			return err
		}
		e.log.Info("embedded NATS", "url", node.URL())
	} else {
		creds, ok := strings.CutPrefix(string(e.cfg.NATS.Creds), "file:")
		if !ok && e.cfg.NATS.Creds != "" {
			return errors.New("nats.creds: want file:/path to a creds file")
		}
		t := e.cfg.NATS.TLS
		nc, err := ledger.Connect(ctx, ledger.ConnectConfig{
			URL: e.cfg.NATS.URL, CredsFile: creds, CAFile: t.CAFile, CertFile: t.CertFile, KeyFile: t.KeyFile, Logger: e.log,
		})
		if err != nil {
			return err
		}
		e.nc = nc
	}
	nc := e.nc
	e.closers = append(e.closers, func() error { nc.Close(); return nil })
	return nil
}

// How often the embedded ledger is tried by a commit of its own, and how long that may fail in a row.
const (
	commitEvery    = 10 // seconds
	commitPatience = 10 * time.Second
)

// watchNode ends the process when the embedded server can no longer serve, so that whoever supervises it notices. A stream whose disk was
// full refuses every commit until a restart, also when there is space again.
func (e *engine) watchNode(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	var failing time.Time
	for beat := 1; ; beat++ {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if err := e.node.Err(); err != nil {
			return fmt.Errorf("embedded NATS: %w", err)
		}
		if failing.IsZero() && beat%commitEvery != 0 {
			continue
		}
		err := e.ledger.Check(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			failing = time.Time{}
		case failing.IsZero():
			failing = time.Now()
			e.log.Error("embedded NATS", "error", err, "disk", e.node.Disk())
		case time.Since(failing) > commitPatience:
			if disk := e.node.Disk(); disk != nil {
				return fmt.Errorf("embedded NATS: %w: %w; make space, then start again", err, disk)
			}
			return fmt.Errorf("embedded NATS: %w; start again", err)
		}
	}
}

func (e *engine) worker(guard *workers.Guard) *workers.Worker {
	rotator := rotatorMaker(e.log)
	return workers.New(workers.Config{
		Name: processName(), Ledger: e.ledger, Store: e.stores.get, Resolve: resolve,
		Rotator: func(_ context.Context, t credential.Target, r credential.Record) (rotators.Rotator, error) {
			return rotator(t, r.ID, r.Spec, r.Adopted)
		},
		Blocked: guard.Blocked, Paused: guard.Paused, Observe: e.observe, Random: rand.Reader, Now: e.clock.Now, Logger: e.log,
	})
}

// observe turns a worker's step into metrics.
func (e *engine) observe(s workers.Step) {
	class := ""
	if s.Outcome.Result == credential.Failed {
		class = s.Outcome.Class.String()
	}
	e.metrics.Step(s.Record.Spec.Target, string(s.Outcome.Phase), string(s.Outcome.Result), class, s.Took, s.Late)
}
