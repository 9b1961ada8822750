package api

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
)

// ill is a ledger that cannot do everything.
type ill struct {
	Ledger
	mu      sync.Mutex
	control error
	behind  time.Duration
}

func (i *ill) GetControl(ctx context.Context) (credential.Control, uint64, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.control != nil {
		return credential.Control{}, 0, i.control
	}
	return i.Ledger.GetControl(ctx)
}

func (i *ill) SourceLag(context.Context) ([]ledger.Lag, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return []ledger.Lag{{Stream: ledger.EventStream, Behind: i.behind}}, nil
}

func (i *ill) set(control error, behind time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.control, i.behind = control, behind
}

func TestReadiness(t *testing.T) {
	i := &ill{}
	e := start(t, func(c *Config) { i.Ledger = c.Ledger; c.Ledger = i })
	eventually(t, "ready", func() bool { r, err := e.admin.Ready(t.Context()); return err == nil && r.Ready })
	i.set(errors.New("secret internals"), 0)
	res, body := e.raw(http.MethodGet, "/readyz", "", nil)
	if res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, `"ledger":"it does not answer"`) || strings.Contains(body, "internals") {
		t.Errorf("without a ledger: %d %s", res.StatusCode, body)
	}
	i.set(nil, 2*time.Minute)
	if res, body = e.raw(http.MethodGet, "/readyz", "", nil); res.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "2m0s behind") {
		t.Errorf("with a wedged stream: %d %s", res.StatusCode, body)
	}
	if res, body = e.raw(http.MethodGet, "/healthz", "", nil); res.StatusCode != http.StatusOK {
		t.Errorf("the process is alive all the same: %d %s", res.StatusCode, body)
	}
}

func TestMetrics(t *testing.T) {
	m := NewMetrics()
	e := start(t, func(c *Config) { c.Metrics = m })
	e.apply(declare("orders/db", "orders/cache"))
	e.drive("orders/db", credential.Draining)
	m.Step("db", "promoting", "done", "", time.Second, 3*time.Second)
	m.Step("db", "proving", "accepted", "", time.Second, 0)
	m.Step("db", "applying", "failed", "transient", time.Second, 0)
	m.Committed("ok", time.Millisecond)
	m.Batched("committed", 7, 21, time.Millisecond)
	want := []string{
		`rekey_rotations_total{result="promoted",target="db"} 1`, `rekey_failures_total{class="transient",target="db"} 1`,
		`rekey_lateness_seconds_count 1`, `rekey_step_seconds_count{phase="proving"} 1`,
		`rekey_ledger_commit_seconds_count{result="ok"} 1`, `rekey_ledger_batch_transitions_sum 7`,
		`rekey_overlaps_open{target="db"} 1`, `rekey_parked{target="db"} 0`, `rekey_suspended{target="db"} 0`, `rekey_overdue{target="db"} 0`,
		`rekey_credentials{state="ok",target="db"} 2`, `rekey_source_lag_seconds{stream="REKEY_AUDIT"}`, "go_goroutines", "process_open_fds",
	}
	scraper := e.as("prometheus", nil, ScopeMetrics)
	var body string
	eventually(t, "metrics", func() bool {
		_, body = e.raw(http.MethodGet, "/metrics", scraper.token, nil)
		return strings.Contains(body, want[6])
	})
	for _, w := range want {
		if !strings.Contains(body, w) {
			t.Errorf("%s is missing", w)
		}
	}
	if strings.Contains(body, "orders/") {
		t.Error("a metric has a credential's id")
	}
}

func TestOpenAPI(t *testing.T) {
	e := start(t)
	res, body := e.raw(http.MethodGet, "/openapi.json", "", nil)
	var doc struct {
		OpenAPI string
		Paths   map[string]map[string]struct {
			Security []map[string][]string
		}
	}
	if err := json.Unmarshal([]byte(body), &doc); err != nil || res.StatusCode != http.StatusOK || !strings.HasPrefix(doc.OpenAPI, "3.1") {
		t.Fatalf("%d %v %s", res.StatusCode, err, doc.OpenAPI)
	}
	for path, ops := range doc.Paths {
		for method, op := range ops {
			if open := path == "/healthz" || path == "/readyz"; open == (len(op.Security) > 0) {
				t.Errorf("%s %s: security %v", method, path, op.Security)
			}
		}
	}
	own, err := e.server.OpenAPI()
	if err != nil || len(own) == 0 {
		t.Errorf("%d bytes, %v", len(own), err)
	}
}

// A stopped server ends its streams and leaves no socket.
func TestStop(t *testing.T) {
	e := start(t)
	l, err := Listen(ListenConfig{Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Ledger: e.ledger, Identities: e.ids})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	c, err := NewClient(ClientConfig{Address: l.Addr().String(), Token: e.admin.token})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.send(t.Context(), http.MethodGet, "/v1/events", StreamQuery{Follow: true}.values(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	stop()
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(4 * time.Second):
		t.Error("an open stream holds up the stop")
	}
	_, err = c.Control(t.Context())
	if !errors.Is(err, ErrUnreachable) {
		t.Errorf("after the stop: %v", err)
	}
	if _, err := NewClient(ClientConfig{Address: "192.0.2.1:80"}); err == nil {
		t.Error("a client would send its token across the network in the clear")
	}
}
