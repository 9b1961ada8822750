package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/rekeyhq/rekey/internal/api"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/rotators"
)

func newServerCommand(a *app) *cobra.Command {
	c := &cobra.Command{
		Use:   "server",
		Short: "Run the engine: API, scheduler and worker in one process",
		Long: `Run the engine: API, scheduler and worker in one process.

Without nats.url in the configuration the process embeds NATS and keeps the ledger in server.data_dir; it refuses anonymous
connections. With nats.url any number of processes share the work.

The process reads server, nats and stores from the configuration. Credentials and targets come from the ledger: see ` + "`rekey apply`" + `.

The first SIGINT or SIGTERM stops cleanly: nothing new is started, what is in flight is finished. The second exits at once, and
nothing is lost by that either.`,
		Example: `  rekey server
  rekey server --config /etc/rekey/rekey.yaml --data-dir /var/lib/rekey`,
		Args: cobra.NoArgs,
	}
	dataDir := c.Flags().String("data-dir", "", "where the ledger and the API's identities are kept (overrides server.data_dir)")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.runEngine(cmd.Context(), roles{api: true, scheduler: true, worker: true}, *dataDir)
	}
	return c
}

func newSchedulerCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "scheduler",
		Short: "Run only a scheduler, on an external NATS",
		Long: `Run only a scheduler: it admits rotations that are due and rings for workers. Any number may run; none leads.

Needs nats.url in the configuration.`,
		Example: "  rekey scheduler --config /etc/rekey/rekey.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.runEngine(cmd.Context(), roles{scheduler: true}, "")
		},
	}
}

func newWorkerCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "worker",
		Short: "Run only a worker, on an external NATS",
		Long: `Run only a worker: it performs rotations and revocations. Any number may run; a target's concurrency holds across all of them.

Needs nats.url in the configuration, the stores, and access to every reference that the targets name.`,
		Example: "  rekey worker --config /etc/rekey/rekey.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.runEngine(cmd.Context(), roles{worker: true}, "")
		},
	}
}

// runEngine loads the configuration and runs the roles until a signal.
func (a *app) runEngine(ctx context.Context, r roles, dataDir string) error {
	cfg, err := a.loadConfig(dataDir)
	if err != nil {
		return err
	}
	log, err := newLogger(a, cfg.Server.Log)
	if err != nil {
		return err
	}
	stopping := context.AfterFunc(ctx, func() {
		log.Info("stopping: what is in flight is finished; a second signal exits at once")
	})
	defer stopping()
	e := &engine{cfg: cfg, roles: r, log: log}
	err = e.run(ctx)
	if err == nil {
		log.Info("stopped")
	}
	return err
}

func newLogger(a *app, l config.Log) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return nil, fmt.Errorf("server.log.level: %w", err)
	}
	opts := &slog.HandlerOptions{Level: level}
	if l.Format == "json" {
		return slog.New(slog.NewJSONHandler(a.stderr, opts)), nil
	}
	return slog.New(slog.NewTextHandler(a.stderr, opts)), nil
}

// serveAPI opens the API's listener and serves it.
func (e *engine) serveAPI(ctx context.Context, g *errgroup.Group) error {
	if err := os.MkdirAll(e.cfg.Server.DataDir, 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	identities, err := api.OpenIdentities(e.cfg.Server.DataDir, time.Now())
	if err != nil {
		return err
	}
	s, err := api.New(api.Config{
		Ledger: e.ledger, Identities: identities, Kinds: kinds(), Probe: prober(e.log), Metrics: e.metrics, Now: e.clock.Now, Logger: e.log, Version: version(),
		Store: func(name string) bool { _, ok := e.cfg.Stores[name]; return ok },
		Reference: func(name, id string) string {
			s, err := e.stores.get(name)
			if err != nil {
				return name + ":" + id
			}
			return s.Reference(id)
		},
	})
	if err != nil {
		return err
	}
	l, err := api.Listen(api.ListenConfig{Address: e.cfg.Server.Listen})
	if err != nil {
		return err
	}
	e.log.Info("API", "address", address(l, e.cfg.Server.Listen))
	g.Go(func() error { return s.Run(ctx) })
	g.Go(func() error { return s.Serve(ctx, l) })
	return nil
}

func address(l net.Listener, configured string) string {
	if l.Addr().Network() == "unix" {
		return configured
	}
	return l.Addr().String()
}

// probeTime bounds one look at an issuer.
const probeTime = 15 * time.Second

// prober asks issuers through their rotators.
func prober(log *slog.Logger) api.Prober {
	rotator := rotatorMaker(log)
	return func(ctx context.Context, t credential.Target, id credential.ID, spec credential.Spec) ([]rotators.Finding, error) {
		ctx, cancel := context.WithTimeout(ctx, probeTime)
		defer cancel()
		spec.StepDeadline = credential.Duration(probeTime) // a look is not a step: it may take longer
		var adopted rotators.VersionID
		if spec.Adopt != nil {
			adopted = spec.Adopt.Version
		}
		r, err := rotator(t, id, spec, adopted)
		if err != nil {
			return nil, err
		}
		c, ok := r.(rotators.Checker)
		if !ok {
			return nil, r.Close()
		}
		found, err := c.Check(ctx)
		if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = fmt.Errorf("no answer within %s: %w", probeTime, err)
		}
		slices.SortStableFunc(found, func(a, b rotators.Finding) int { // what stops us first
			switch {
			case a.Fatal == b.Fatal:
				return 0
			case a.Fatal:
				return -1
			}
			return 1
		})
		return found, errors.Join(err, r.Close())
	}
}
