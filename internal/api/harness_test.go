package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rekeyhq/rekey/internal/config"
	"github.com/rekeyhq/rekey/internal/credential"
	"github.com/rekeyhq/rekey/internal/ledger"
	"github.com/rekeyhq/rekey/rotators"
)

// env is a server over a real ledger, answering on a real unix socket.
type env struct {
	t      *testing.T
	ledger *ledger.Ledger
	server *Server
	ids    *Identities
	dir    string
	socket string
	admin  *Client
}

type fakeTarget struct {
	Host string `json:"host"`
}

func (f fakeTarget) Validate() error {
	if f.Host == "" {
		return errors.New("host: missing")
	}
	return nil
}

type fakeCredential struct {
	Role string `json:"role"`
	// Live is how many versions the issuer holds; 2 if zero.
	Live int `json:"live,omitempty"`
}

func kinds() config.Kinds {
	return config.Kinds{Targets: map[string]config.Kind{"fake": {
		Target: fakeTarget{}, Credential: fakeCredential{},
		Traits: func(_, c json.RawMessage) (rotators.Traits, error) {
			var f fakeCredential
			if err := json.Unmarshal(c, &f); err != nil {
				return rotators.Traits{}, err
			}
			return rotators.Traits{MaxLive: max(f.Live, 2), Countable: true, Kills: true}, nil
		},
		Claims: func(_, c json.RawMessage) []string {
			var f fakeCredential
			_ = json.Unmarshal(c, &f)
			return []string{f.Role}
		},
	}}}
}

// start runs a server. change may wrap the ledger or change the configuration.
func start(t *testing.T, change ...func(*Config)) *env {
	t.Helper()
	dir, err := os.MkdirTemp("", "api") // a short path: a socket's is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	srv, err := ledger.StartEmbedded(ledger.EmbeddedConfig{DataDir: filepath.Join(dir, "data")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Shutdown)
	nc, err := srv.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	led, err := ledger.Open(t.Context(), ledger.Config{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(led.Close)
	e := &env{t: t, ledger: led, dir: dir, socket: filepath.Join(dir, "api.sock")}
	if e.ids, err = OpenIdentities(dir, time.Now()); err != nil {
		t.Fatal(err)
	}
	c := Config{Ledger: led, Identities: e.ids, Kinds: kinds(), Version: "test", Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, f := range change {
		f(&c)
	}
	if e.server, err = New(c); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(ListenConfig{Address: "unix:" + e.socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- e.server.Serve(ctx, l) }()
	go func() { done <- e.server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Errorf("server: %v", err)
			}
		}
	})
	b, err := os.ReadFile(filepath.Join(dir, AdminTokenFile))
	if err != nil {
		t.Fatal(err)
	}
	e.admin = e.client(strings.TrimSpace(string(b)))
	return e
}

func (e *env) client(token string) *Client {
	e.t.Helper()
	c, err := NewClient(ClientConfig{Address: "unix:" + e.socket, Token: token})
	if err != nil {
		e.t.Fatal(err)
	}
	return c
}

// as makes an identity and its client.
func (e *env) as(name string, teams []string, scopes ...Scope) *Client {
	e.t.Helper()
	token, hash := NewToken()
	if _, err := e.admin.AddIdentity(e.t.Context(), NewIdentity{Name: name, Scopes: scopes, Teams: teams, TokenSHA256: hash}); err != nil {
		e.t.Fatal(err)
	}
	return e.client(token)
}

func target(name string) credential.Target {
	return credential.Target{
		Name: name, Kind: "fake", Environment: "test", Owner: "orders", Concurrency: 2,
		StepDeadline: credential.Duration(5 * time.Second), Fields: json.RawMessage(`{"host":"` + name + `.example"}`),
	}
}

func spec(role string) credential.Spec {
	return credential.Spec{
		Target: "db", Kind: "fake", Store: "files", Owner: "orders", Environment: "test", Purpose: "tests",
		Every: credential.Duration(time.Hour), StepDeadline: credential.Duration(5 * time.Second),
		Overlap: credential.Overlap{Min: credential.Duration(time.Minute), Max: credential.Duration(time.Minute)},
		Fields:  json.RawMessage(`{"role":"` + role + `"}`), Traits: rotators.Traits{MaxLive: 2, Countable: true, Kills: true},
	}
}

// declare is a request with one credential per id, each with a role of its own.
func declare(ids ...credential.ID) ApplyRequest {
	q := ApplyRequest{Targets: []credential.Target{target("db")}, Credentials: map[credential.ID]credential.Spec{}}
	for _, id := range ids {
		q.Credentials[id] = spec(id.Token())
	}
	return q
}

func (e *env) apply(q ApplyRequest) ApplyResult {
	e.t.Helper()
	out, err := e.admin.Apply(e.t.Context(), q)
	if err != nil {
		e.t.Fatal(err)
	}
	return out
}

// drive plays scheduler and worker until the record is in the phase.
func (e *env) drive(id credential.ID, until credential.Phase) credential.Record {
	e.t.Helper()
	for range 50 {
		r, seq, err := e.ledger.Get(e.t.Context(), id)
		if err != nil {
			e.t.Fatal(err)
		}
		if r.Phase == until && r.Claim == nil {
			return r
		}
		var in credential.Input = credential.Tick{Worker: "w"}
		switch {
		case r.Phase == credential.Idle:
			in = credential.Request{Verb: credential.Rotate, Actor: "scheduler"}
		case r.Claim != nil:
			o := credential.Outcome{Worker: r.Claim.Worker, Phase: r.Phase, Result: credential.Done}
			switch r.Phase {
			case credential.Staging:
				o.Version = rotators.VersionID([]string{"a", "b"}[r.Generation%2])
			case credential.Proving:
				o.Result = credential.Accepted
			case credential.ProvingDead, credential.ProvingKill:
				o.Result = credential.Rejected
			}
			in = o
		}
		next, _, err := credential.Next(r, in, time.Now())
		if err != nil {
			e.t.Fatal(err)
		}
		if next.Rev == r.Rev {
			e.t.Fatalf("%s does not leave %s for %s", id, r.Phase, until)
		}
		if _, err := e.ledger.Commit(e.t.Context(), next, seq); err != nil && !errors.Is(err, credential.ErrStale) {
			e.t.Fatal(err)
		}
	}
	e.t.Fatalf("%s did not reach %s", id, until)
	return credential.Record{}
}

// raw sends one request as bytes say and returns the answer.
func (e *env) raw(method, path, token string, body io.Reader) (*http.Response, string) {
	e.t.Helper()
	req, err := http.NewRequestWithContext(e.t.Context(), method, "http://rekey"+path, body)
	if err != nil {
		e.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	req.Header.Set("Content-Type", "application/json")
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", e.socket)
	}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		e.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(io.LimitReader(res.Body, 8<<20))
	return res, string(b)
}

// refused wants an answer of this status that says each of these.
func refused(t *testing.T, err error, status int, says ...string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want an answer with status %d", err, status)
		return
	}
	if e.Status != status {
		t.Errorf("status %d (%s), want %d", e.Status, e, status)
	}
	for _, s := range says {
		if !strings.Contains(e.Error(), s) {
			t.Errorf("%q does not say %q", e.Error(), s)
		}
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
