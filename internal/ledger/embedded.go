package ledger

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/rekeyhq/rekey/internal/credential"
)

// EmbeddedConfig says where the embedded server keeps its data and listens. DataDir is required.
type EmbeddedConfig struct {
	// DataDir is made if it is missing. The server's files are in its folder nats, readable by the owner only.
	DataDir string
	// Host to listen on; 127.0.0.1 if empty. Others than loopback need TLS.
	Host string
	// Port to listen on; a free one if 0.
	Port int
	// TLS for connections over the network. The engine's own connection stays inside the process.
	TLS *tls.Config
	// Timeout bounds the start, in which the stored messages are read; 30 s if zero.
	Timeout time.Duration
	// Logger receives the server's warnings and errors, and its notices at level debug; discarded if nil.
	Logger *slog.Logger
}

// Embedded is a NATS server inside this process. It syncs every write and lets nobody in without an identity of its own.
type Embedded struct {
	ns    *server.Server
	id    identity
	cfg   EmbeddedConfig
	dir   string // DataDir/nats
	lock  *os.File
	log   *serverLog
	close sync.Once
}

// EngineCreds is the file, inside the folder nats of the data directory, with which other engine processes connect.
const EngineCreds = "engine.creds"

// unlimitedStore is a limit that no disk reaches: a limit would refuse commits while there is space.
const unlimitedStore = 1 << 60

// StartEmbedded starts the server, after making its identities on the first start. It fails, having changed nothing, if
// another server uses the data directory, if that is not writable or full, and if stored data is not readable with the
// identities found.
func StartEmbedded(cfg EmbeddedConfig) (*Embedded, error) {
	e, err := startEmbedded(cfg)
	if err != nil {
		return nil, fmt.Errorf("start embedded NATS: %w", err)
	}
	return e, nil
}

func startEmbedded(cfg EmbeddedConfig) (_ *Embedded, err error) {
	cfg.Host, cfg.Timeout = orDefault(cfg.Host, "127.0.0.1"), orDefault(cfg.Timeout, 30*time.Second)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case cfg.DataDir == "":
		return nil, errors.New("no data directory")
	case cfg.TLS == nil && !loopback(cfg.Host):
		return nil, fmt.Errorf("host %s is not loopback: listening there needs TLS", cfg.Host)
	}
	dir := filepath.Join(cfg.DataDir, "nats")
	store := filepath.Join(dir, "store")
	if err := os.MkdirAll(store, 0o700); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	lock, err := lockDir(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = lock.Close()
		}
	}()
	if err := probe(dir); err != nil {
		return nil, fmt.Errorf("data directory %s: %w", cfg.DataDir, err)
	}
	id, err := loadIdentity(dir, store)
	if err != nil {
		return nil, err
	}
	e := &Embedded{id: id, cfg: cfg, dir: dir, lock: lock, log: &serverLog{log: cfg.Logger}}
	if err := e.start(store); err != nil {
		e.stop()
		return nil, err
	}
	return e, nil
}

func (e *Embedded) start(store string) error {
	operator, accounts, system, err := e.id.claims()
	if err != nil {
		return err
	}
	resolver := &server.MemAccResolver{}
	for pub, token := range accounts {
		if err := resolver.Store(pub, token); err != nil {
			return err
		}
	}
	opts := &server.Options{
		ServerName: "rekey", Host: e.cfg.Host, Port: orDefault(e.cfg.Port, server.RANDOM_PORT),
		NoSigs: true, TLSConfig: e.cfg.TLS, TLS: e.cfg.TLS != nil, TLSTimeout: 5,
		TrustedOperators: []*jwt.OperatorClaims{operator}, SystemAccount: system, AccountResolver: resolver,
		JetStream: true, StoreDir: store, SyncAlways: true, JetStreamMaxStore: unlimitedStore,
	}
	if e.ns, err = server.NewServer(opts); err != nil {
		return err
	}
	e.ns.SetLoggerV2(e.log, false, false, false)
	e.ns.Start()
	for deadline := time.Now().Add(e.cfg.Timeout); !e.ns.ReadyForConnections(100 * time.Millisecond); {
		if fatal := e.log.lastFatal(); fatal != "" { // such as a port that is taken: it will not become ready
			return errors.New(fatal)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not ready after %s: %w", e.cfg.Timeout, e.Err())
		}
	}
	if err := e.Err(); err != nil {
		return err
	}
	creds, err := e.id.creds("engine", e.id.engine, jwt.Permissions{})
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(e.dir, EngineCreds), creds); err != nil {
		return err
	}
	return e.recovered(store)
}

// recovered fails if the disk holds a stream that the server does not show: it could not be read, and must not be made anew.
func (e *Embedded) recovered(store string) error {
	pub, err := e.id.account.PublicKey()
	if err != nil {
		return err
	}
	dirs, err := filepath.Glob(filepath.Join(store, "jetstream", pub, "streams", "*"))
	if err != nil || len(dirs) == 0 {
		return err
	}
	nc, err := e.Connect()
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.Timeout)
	defer cancel()
	shown := map[string]bool{}
	names := js.StreamNames(ctx)
	for name := range names.Name() {
		shown[name] = true
	}
	if err := names.Err(); err != nil {
		return fmt.Errorf("list streams: %w", err)
	}
	for _, dir := range dirs {
		if name := filepath.Base(dir); !shown[name] {
			return fmt.Errorf("stream %s in %s could not be read: restore it from a backup, nothing was changed", name, dir)
		}
	}
	return nil
}

// Connect opens a connection of the engine inside the process. The caller closes it.
func (e *Embedded) Connect(opts ...nats.Option) (*nats.Conn, error) {
	opts = append(append(connOptions("rekey", e.cfg.Logger), nats.InProcessServer(e.ns), nats.UserCredentials(e.EngineCreds())), opts...)
	nc, err := nats.Connect("", opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to embedded NATS: %w", err)
	}
	return nc, nil
}

// URL is where others connect to.
func (e *Embedded) URL() string {
	scheme := "nats://"
	if e.cfg.TLS != nil {
		scheme = "tls://"
	}
	return scheme + e.ns.Addr().String()
}

// EngineCreds is the path of the engine's creds file. Whoever can read it can do everything in the ledger.
func (e *Embedded) EngineCreds() string { return filepath.Join(e.dir, EngineCreds) }

// ConsumerCreds makes a new identity for a consumer, limited by ConsumerPermissions, and returns its creds file. It is
// kept nowhere; calling again makes another.
func (e *Embedded) ConsumerCreds(consumer string, ids []credential.ID) ([]byte, error) {
	p, err := ConsumerPermissions(consumer, ids)
	if err != nil {
		return nil, err
	}
	user, err := nkeys.CreateUser()
	if err != nil {
		return nil, err
	}
	return e.id.creds(consumer, user, p)
}

// Err says why the server cannot serve at all, nil if it can. A stream whose disk was full refuses every commit until the
// server is restarted, also when there is space again: Ledger.Check shows that.
func (e *Embedded) Err() error {
	if fatal := e.log.lastFatal(); fatal != "" {
		return errors.New(fatal)
	}
	switch {
	case !e.ns.Running():
		return errors.New("the server is not running")
	case !e.ns.JetStreamEnabled():
		return errors.New("JetStream is disabled, probably because the disk is full or failed: make space and restart")
	}
	return nil
}

// Disk says why the data directory cannot be written, nil if it can. It writes, syncs and removes a file.
func (e *Embedded) Disk() error {
	if err := probe(e.dir); err != nil {
		return fmt.Errorf("data directory %s: %w", e.cfg.DataDir, err)
	}
	return nil
}

// Shutdown stops the server cleanly and releases the data directory. Close connections before. It may be called again.
func (e *Embedded) Shutdown() { e.close.Do(e.stop) }

func (e *Embedded) stop() {
	if e.ns != nil {
		e.ns.Shutdown()
		e.ns.WaitForShutdown()
	}
	_ = e.lock.Close()
}

func loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// probe writes and syncs a file, so that a full or read-only disk is found before the server does.
func probe(dir string) error {
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.Write(make([]byte, 256<<10))
	return errors.Join(err, f.Sync(), f.Close())
}

// serverLog passes the server's log on. It never ends the process, unlike the server's own on a fatal error.
type serverLog struct {
	log   *slog.Logger
	mu    sync.Mutex
	fatal string
}

func (s *serverLog) lastFatal() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fatal
}

func (s *serverLog) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	s.mu.Lock()
	s.fatal = text
	s.mu.Unlock()
	s.log.Error("nats server", "text", text)
}

func (s *serverLog) Errorf(format string, v ...any) {
	s.log.Error("nats server", "text", fmt.Sprintf(format, v...))
}

func (s *serverLog) Warnf(format string, v ...any) {
	s.log.Warn("nats server", "text", fmt.Sprintf(format, v...))
}

func (s *serverLog) Noticef(format string, v ...any) {
	s.log.Debug("nats server", "text", fmt.Sprintf(format, v...))
}

func (s *serverLog) Debugf(string, ...any) {}
func (s *serverLog) Tracef(string, ...any) {}
