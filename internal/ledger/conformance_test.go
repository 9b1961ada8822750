package ledger_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/internal/ledger/ledgertest"
)

func TestEmbeddedConformance(t *testing.T) {
	t.Parallel() // it mostly waits
	ledgertest.Run(t, func(t *testing.T) ledgertest.Subject {
		e := startEmbedded(t, t.TempDir())
		nc := connect(t, e)
		return ledgertest.Subject{
			Ledger:      open(t, ledger.Config{Conn: nc}),
			Again:       func(t *testing.T) ledgertest.Ledger { return open(t, ledger.Config{Conn: connect(t, e)}) },
			Acknowledge: acknowledge(nc),
		}
	})
}

// startEmbedded starts a server that ends with the test.
func startEmbedded(t testing.TB, dir string) *ledger.Embedded {
	t.Helper()
	e, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: dir, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Shutdown)
	return e
}

func connect(t testing.TB, e *ledger.Embedded) *nats.Conn {
	t.Helper()
	nc, err := e.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func open(t testing.TB, cfg ledger.Config) *ledger.Ledger {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = logger(t)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l, err := ledger.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func acknowledge(nc *nats.Conn) func(*testing.T, credential.ID, string, []byte) {
	return func(t *testing.T, id credential.ID, consumer string, body []byte) {
		t.Helper()
		if _, err := nc.Request("rekey.ack."+id.Token()+"."+consumer, body, 5*time.Second); err != nil {
			t.Fatal(err)
		}
	}
}

// logger writes warnings into the test's own log.
func logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}
