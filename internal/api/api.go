// Package api is the engine's HTTP API: inventory, requests, emergencies, apply, events, audit and identities, with an OpenAPI
// 3.1 document made from the same code. Every request is authenticated, on a unix socket too. No answer holds a secret.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
	"github.com/google/uuid"

	"github.com/rekeyhq/rekey/events"
	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// Ledger is the part of a ledger that the API needs; *ledger.Ledger has it.
type Ledger interface {
	Incarnation() uuid.UUID
	Get(ctx context.Context, id credential.ID) (credential.Record, uint64, error)
	List(ctx context.Context) ([]credential.Record, error)
	Commit(ctx context.Context, r credential.Record, seq uint64) (uint64, error)
	Watch(ctx context.Context, fn func(credential.Record), ready func()) error

	GetTarget(ctx context.Context, name string) (credential.Target, uint64, error)
	PutTarget(ctx context.Context, t credential.Target, seq uint64) (uint64, error)
	DeleteTarget(ctx context.Context, name string, seq uint64) error
	Targets(ctx context.Context) ([]credential.Target, error)
	EnsureLanes(ctx context.Context, target string, concurrency int) error
	RemoveLanes(ctx context.Context, target string) error

	CreateIncident(ctx context.Context, i credential.Incident) (credential.Incident, uint64, error)
	GetIncident(ctx context.Context, id string) (credential.Incident, uint64, error)
	GetControl(ctx context.Context) (credential.Control, uint64, error)
	SetControl(ctx context.Context, c credential.Control, seq uint64) (uint64, error)

	Events(ctx context.Context, q ledger.Query, fn func(events.Event) error) error
	Audit(ctx context.Context, q ledger.Query, fn func(e credential.Entry, sequence uint64) error) error
	SourceLag(ctx context.Context) ([]ledger.Lag, error)
	CatchUp(ctx context.Context) error
}

// Config of a Server. Ledger and Identities are required.
type Config struct {
	Ledger     Ledger
	Identities *Identities
	// Kinds are what apply accepts. A kind that is not in it is refused.
	Kinds config.Kinds
	// Store reports whether the server knows a store of this name; nil accepts every name.
	Store func(name string) bool
	// Reference says where consumers find a credential in a store; nil answers store:team/name.
	Reference func(store, credential string) string
	// Probe asks issuers before an apply is taken; nil asks nobody.
	Probe Prober
	// Metrics are shown on /metrics; nil for new ones.
	Metrics *Metrics
	// Version of the program, for the OpenAPI document.
	Version string
	// MaxConnections open at once; 512 if zero. Beyond it, those that are not in a request are closed, oldest first.
	MaxConnections int
	// EventRetention is how far back audit verify expects every announced event; 90 days if zero.
	EventRetention time.Duration
	Now            func() time.Time
	Logger         *slog.Logger
}

// Server answers requests. It may be used by many goroutines.
type Server struct {
	Config
	api    huma.API
	mux    *http.ServeMux
	fleet  *fleet
	limits limits
	// applying has room for one: applies wait for each other.
	applying chan struct{}
	streams  context.Context // ends when Serve does, so that open streams end
	stop     context.CancelFunc
}

// New fills in the defaults of c and registers every operation. It has no effect yet: see Run and Serve.
func New(c Config) (*Server, error) {
	if c.Ledger == nil || c.Identities == nil {
		return nil, errors.New("api: a ledger and identities are required")
	}
	if c.Reference == nil {
		c.Reference = func(store, id string) string { return store + ":" + id }
	}
	if c.Store == nil {
		c.Store = func(string) bool { return true }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics()
	}
	if c.MaxConnections == 0 {
		c.MaxConnections = 512
	}
	if c.EventRetention == 0 {
		c.EventRetention = 90 * 24 * time.Hour
	}
	if c.Version == "" {
		c.Version = "unknown"
	}
	s := &Server{Config: c, mux: http.NewServeMux(), fleet: newFleet()}
	s.streams, s.stop = context.WithCancel(context.Background())
	c.Metrics.watch(s.fleet)

	hc := huma.DefaultConfig("rekey", c.Version)
	hc.Info.Description = "Credential rotation. Every operation but the health checks needs a bearer token. No answer holds a secret."
	hc.DocsPath, hc.SchemasPath = "", "" // a page would load scripts from elsewhere; the document holds the schemas
	hc.CreateHooks = nil                 // no $schema in bodies
	hc.RejectUnknownQueryParameters = true
	hc.Transformers = []huma.Transformer{withoutValues}
	hc.Components.Schemas = huma.NewMapRegistry("#/components/schemas/", schemaName)
	hc.Components.SecuritySchemes = map[string]*huma.SecurityScheme{"token": {Type: "http", Scheme: "bearer"}}
	s.api = humago.New(s.mux, hc)
	s.api.UseMiddleware(s.guard)
	s.register()
	return s, nil
}

// schemaName tells what a client declares from what it is shown: both have a Target.
func schemaName(t reflect.Type, hint string) string {
	name := huma.DefaultSchemaNamer(t, hint)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if strings.HasSuffix(t.PkgPath(), "internal/credential") {
		return "Declared" + name
	}
	return name
}

// withoutValues keeps what a client sent out of the answer: it may be a secret that it took for a reference.
func withoutValues(_ huma.Context, _ string, v any) (any, error) {
	if m, ok := v.(*huma.ErrorModel); ok {
		for _, d := range m.Errors {
			if d != nil {
				d.Value = nil
			}
		}
	}
	return v, nil
}

func (s *Server) register() {
	s.registerCredentials()
	s.registerEmergencies()
	s.registerFleet()
	s.registerApply()
	s.registerStreams()
	s.registerIdentities()
	s.registerHealth()
}

// Handler is the API without its listener, connection limits and timeouts.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ct := r.Header.Get("Content-Type"); r.ContentLength != 0 && ct == "" {
			r.Header.Set("Content-Type", "application/json")
		}
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		if _, pattern := s.mux.Handler(r); pattern == "" {
			s.noRoute(w, r)
			return
		}
		s.mux.ServeHTTP(w, r)
	})
}

// OpenAPI is the API's own description, as JSON.
func (s *Server) OpenAPI() ([]byte, error) { return s.api.OpenAPI().MarshalJSON() }

// Run keeps the inventory and the gauges up to date until ctx ends. Listing waits for its first pass.
func (s *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		ticker := time.NewTicker(15 * time.Second)
		defer ticker.Stop()
		for {
			s.measureLag(ctx)
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	})
	err := s.Ledger.Watch(ctx, s.fleet.put, s.fleet.ready)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("watch records: %w", err)
}

func (s *Server) measureLag(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lags, err := s.Ledger.SourceLag(ctx)
	if err != nil {
		return // readiness reports it
	}
	for _, l := range lags {
		s.Metrics.lag.WithLabelValues(l.Stream).Set(l.Behind.Seconds())
	}
}

// The time limits of a connection. A stream renews its write deadline with every line.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 20 * time.Second
	writeTimeout  = 60 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 16 << 10
	stopTimeout   = 5 * time.Second
)

// Serve answers on l until ctx ends, then finishes requests under way for up to 5 s, ends streams, and returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	conns := newConnections(s.MaxConnections)
	srv := &http.Server{
		Handler:           conns.busy(s.Handler()),
		ReadHeaderTimeout: headerTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ConnContext:    conns.context,
		ConnState:      conns.state,
		ErrorLog:       slog.NewLogLogger(s.Logger.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	s.stop()
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := srv.Shutdown(stopping); err != nil {
		_ = srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}
