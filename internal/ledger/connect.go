package ledger

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
)

// ConnectConfig says how an external server is reached. URL is required.
type ConnectConfig struct {
	// URL names one or more servers, separated by commas: nats:// or tls://.
	URL string
	// CredsFile holds a user's JWT and nkey. Empty only where TLS client certificates identify us.
	CredsFile string
	// CAFile, CertFile and KeyFile are PEM files: the authorities that we trust, our certificate and its key.
	CAFile, CertFile, KeyFile string
	// Name shows in the server's list of connections; "rekey" if empty.
	Name string
	// Timeout bounds the first connection; 5 s if zero.
	Timeout time.Duration
	// Logger receives disconnects and errors; discarded if nil.
	Logger *slog.Logger
}

// Connect connects to an external server and checks that it is new enough. Later it reconnects for ever. While it is
// disconnected nothing is buffered: what could not be sent fails at once and does not happen later.
func Connect(ctx context.Context, cfg ConnectConfig) (*nats.Conn, error) {
	if cfg.URL == "" {
		return nil, errors.New("connect to NATS: no URL")
	}
	opts := append(connOptions(cfg.Name, cfg.Logger), nats.Timeout(orDefault(cfg.Timeout, 5*time.Second)))
	if cfg.CredsFile != "" {
		opts = append(opts, nats.UserCredentials(cfg.CredsFile))
	}
	if cfg.CAFile != "" {
		opts = append(opts, nats.RootCAs(cfg.CAFile))
	}
	if cfg.CertFile != "" || cfg.KeyFile != "" {
		if cfg.CredsFile == "" {
			opts = append(opts, nats.Secure(&tls.Config{MinVersion: tls.VersionTLS12}))
		}
		opts = append(opts, nats.ClientCert(cfg.CertFile, cfg.KeyFile))
	}
	type answer struct {
		nc  *nats.Conn
		err error
	}
	done := make(chan answer, 1)
	go func() {
		nc, err := nats.Connect(cfg.URL, opts...)
		done <- answer{nc, err}
	}()
	select {
	case a := <-done:
		if a.err != nil {
			return nil, fmt.Errorf("connect to NATS at %s: %w", cfg.URL, a.err)
		}
		if err := checkServer(a.nc); err != nil {
			a.nc.Close()
			return nil, fmt.Errorf("connect to NATS at %s: %w", cfg.URL, err)
		}
		return a.nc, nil
	case <-ctx.Done():
		go func() {
			if a := <-done; a.nc != nil {
				a.nc.Close()
			}
		}()
		return nil, fmt.Errorf("connect to NATS at %s: %w", cfg.URL, ctx.Err())
	}
}

// connOptions are common to embedded and external connections.
func connOptions(name string, log *slog.Logger) []nats.Option {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if name == "" {
		name = "rekey"
	}
	return []nats.Option{
		nats.Name(name),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 500*time.Millisecond),
		nats.ReconnectBufSize(-1),
		nats.PingInterval(10 * time.Second),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("nats disconnected", "error", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) { log.Info("nats reconnected", "server", nc.ConnectedServerName()) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("nats error", "error", err) }),
	}
}

func orDefault[T comparable](v, def T) T {
	var zero T
	if v == zero {
		return def
	}
	return v
}
