package events_test

import (
	"context"
	"log/slog"
	"os"
	"os/signal"

	"github.com/nats-io/nats.go"

	"github.com/rekeyhq/rekey/events"
)

// An application reads its database password again whenever it has been rotated.
func ExampleSubscribe() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	nc, err := nats.Connect("tls://nats.example.com:4222", nats.UserCredentials("orders-api.creds"), nats.MaxReconnects(-1))
	if err != nil {
		slog.Error("connect", "error", err)
		return
	}
	defer nc.Close()

	filter := events.Filter{Credentials: []string{"orders/db"}, Types: []string{events.Rotated}}
	err = events.Subscribe(ctx, nc, filter, events.Options{Durable: "orders-api"}, func(ctx context.Context, e events.Event) error {
		slog.Info("rotated", "credential", e.Subject, "generation", e.Data.Generation, "old works until", e.Data.ValidUntil)
		return reload(ctx, e.Data.Reference) // an error: the event comes again
	})
	if ctx.Err() == nil {
		slog.Error("subscribe", "error", err)
	}
}

func reload(context.Context, string) error { return nil }
