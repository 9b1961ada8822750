package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/rekeyhq/rekey/internal/credential"
)

// need is what an operation asks of an identity.
type need struct {
	// scopes: one of them is enough. Nil: nobody passes, so that a forgotten one shows.
	scopes []Scope
	// open needs no identity at all.
	open bool
	// fleet operations reach beyond a team: identities that are limited to teams are refused.
	fleet bool
	lane  lane
	long  bool // may take minutes
}

// lane bounds how many requests of one kind an identity has under way, so that open streams never hold up an emergency.
type lane string

const (
	laneRequest   lane = "request"
	laneStream    lane = "stream"
	laneEmergency lane = "emergency"
)

func (l lane) limit() int {
	switch l {
	case laneStream:
		return 16
	default:
		return 64
	}
}

// limits counts requests under way.
type limits struct {
	mu    sync.Mutex
	under map[string]int
}

// take reports whether there was room, and how to give it back.
func (l *limits) take(who string, of lane) (release func(), ok bool) {
	key := string(of) + " " + who
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.under == nil {
		l.under = map[string]int{}
	}
	if l.under[key] >= of.limit() {
		return nil, false
	}
	l.under[key]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.under[key]--; l.under[key] == 0 {
			delete(l.under, key)
		}
	}, true
}

const needKey = "rekey.need"

// Body limits, in bytes.
const (
	maxBody  = 64 << 10
	maxApply = 4 << 20
)

// operation describes one operation; path parameters and bodies come from its handler's types.
func operation(method, path, id, summary string, n need) huma.Operation {
	op := huma.Operation{
		Method: method, Path: path, OperationID: id, Summary: summary, MaxBodyBytes: maxBody,
		Metadata: map[string]any{needKey: n},
	}
	if !n.open {
		op.Security = []map[string][]string{{"token": {}}}
		op.Description = "Needs the scope " + strings.ReplaceAll(joined(n.scopes), ",", " or") + "."
		if n.fleet {
			op.Description += " Refused to identities that are limited to teams."
		}
		op.Errors = []int{http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests}
	}
	return op
}

type identityKey struct{}

// who is the identity of a request that passed the guard.
func who(ctx context.Context) Identity {
	id, _ := ctx.Value(identityKey{}).(Identity)
	return id
}

// guard lets a request pass only with a token whose identity may do this, to this team, now. It comes before the body is read.
func (s *Server) guard(ctx huma.Context, next func(huma.Context)) {
	n, ok := ctx.Operation().Metadata[needKey].(need)
	_, w := humago.Unwrap(ctx)
	ctx = huma.WithValue(ctx, controllerKey{}, http.NewResponseController(w))
	if ok && n.open {
		next(ctx)
		return
	}
	refuse := func(status int, format string, args ...any) {
		_ = huma.WriteErr(s.api, ctx, status, fmt.Sprintf(format, args...))
	}
	token, bearer := strings.CutPrefix(ctx.Header("Authorization"), "Bearer ")
	if !bearer || token == "" {
		ctx.SetHeader("WWW-Authenticate", `Bearer realm="rekey"`)
		refuse(http.StatusUnauthorized, "no token: send Authorization: Bearer TOKEN; the first one is in %s of the server's data directory", AdminTokenFile)
		return
	}
	id, known := s.Identities.Authenticate(token)
	if !known {
		ctx.SetHeader("WWW-Authenticate", `Bearer realm="rekey", error="invalid_token"`)
		refuse(http.StatusUnauthorized, "the token is unknown or was removed: ask an admin for one (rekey identity add)")
		return
	}
	if !slices.ContainsFunc(n.scopes, id.has) {
		refuse(http.StatusForbidden, "identity %s has the scopes %s; this needs %s", id.Name, joined(id.Scopes), strings.ReplaceAll(joined(n.scopes), ",", " or"))
		return
	}
	if n.fleet && len(id.Teams) > 0 {
		refuse(http.StatusForbidden, "identity %s is limited to %s; this reaches beyond a team", id.Name, joined(id.Teams))
		return
	}
	if team := ctx.Param("team"); team != "" && !id.allows(team) {
		refuse(http.StatusForbidden, "identity %s is limited to %s", id.Name, joined(id.Teams))
		return
	}
	l := n.lane
	if l == "" {
		l = laneRequest
	}
	release, free := s.limits.take(id.Name, l)
	if !free {
		ctx.SetHeader("Retry-After", "1")
		refuse(http.StatusTooManyRequests, "identity %s has %d requests of this kind under way: wait for one to end", id.Name, l.limit())
		return
	}
	defer release()
	next(huma.WithValue(ctx, identityKey{}, id))
}

// noRoute answers what no operation matches as a problem, like everything else.
func (s *Server) noRoute(w http.ResponseWriter, r *http.Request) {
	h, _ := s.mux.Handler(r)
	probe := &statusOnly{header: http.Header{}}
	h.ServeHTTP(probe, r)
	status := probe.status
	if status != http.StatusMethodNotAllowed {
		status = http.StatusNotFound
	} else if allow := probe.header.Get("Allow"); allow != "" {
		w.Header().Set("Allow", allow)
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(&huma.ErrorModel{
		Title: http.StatusText(status), Status: status, Detail: fmt.Sprintf("there is no operation %s %s: see /openapi.json", r.Method, clip(r.URL.Path)),
	})
}

// statusOnly is a ResponseWriter that keeps the status.
type statusOnly struct {
	header http.Header
	status int
}

func (p *statusOnly) Header() http.Header         { return p.header }
func (p *statusOnly) Write(b []byte) (int, error) { return len(b), nil }
func (p *statusOnly) WriteHeader(status int)      { p.status = status }

// parse reads an id of a path.
func parse(team, name string) (credential.ID, error) {
	id, err := credential.ParseID(team + "/" + name)
	if err != nil {
		return "", huma.Error422UnprocessableEntity(err.Error())
	}
	return id, nil
}

type controllerKey struct{}

// handlerTimeout bounds an ordinary handler; longTimeout one that reads or writes much.
const (
	handlerTimeout = 45 * time.Second
	longTimeout    = 15 * time.Minute
)

// add registers an operation whose handler has as long as its need says, whatever the server's write timeout.
func add[I, O any](s *Server, op huma.Operation, h func(context.Context, *I) (*O, error)) {
	n, _ := op.Metadata[needKey].(need)
	huma.Register(s.api, op, func(ctx context.Context, in *I) (*O, error) {
		timeout := handlerTimeout
		if n.long {
			timeout = longTimeout
		}
		patient(ctx, timeout)
		if n.lane != laneStream {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		return h(ctx, in)
	})
}

// patient gives the connection of a request this much time to answer.
func patient(ctx context.Context, d time.Duration) {
	if rc, ok := ctx.Value(controllerKey{}).(*http.ResponseController); ok {
		_ = rc.SetWriteDeadline(time.Now().Add(d + 10*time.Second)) // unsupported by a test's recorder only
	}
}
