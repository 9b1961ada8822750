package api

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/danielgtaylor/huma/v2"
)

// matrix is who may do what, written down apart from the code: operation -> scopes, any of which is enough. Nil: everybody.
func matrix() map[string][]Scope {
	return map[string][]Scope{
		"GET /v1/credentials":                         {ScopeRead},
		"GET /v1/credentials/{team}/{name}":           {ScopeRead},
		"POST /v1/credentials/{team}/{name}/rotate":   {ScopeRotate},
		"POST /v1/credentials/{team}/{name}/hold":     {ScopeOperate},
		"POST /v1/credentials/{team}/{name}/rollback": {ScopeOperate},
		"POST /v1/credentials/{team}/{name}/pause":    {ScopeOperate},
		"POST /v1/credentials/{team}/{name}/resume":   {ScopeOperate},
		"POST /v1/credentials/{team}/{name}/restore":  {ScopeOperate},
		"POST /v1/credentials/{team}/{name}/kill":     {ScopeEmergency},
		"POST /v1/credentials/{team}/{name}/replace":  {ScopeEmergency},
		"GET /v1/incidents/{id}":                      {ScopeRead, ScopeEmergency},
		"GET /v1/control":                             {ScopeRead},
		"POST /v1/control":                            {ScopeOperate},
		"GET /v1/targets":                             {ScopeRead},
		"POST /v1/apply":                              {ScopeApply},
		"GET /v1/events":                              {ScopeRead},
		"GET /v1/audit":                               {ScopeRead},
		"GET /v1/audit/verify":                        {ScopeRead},
		"GET /v1/identities":                          {ScopeAdmin},
		"POST /v1/identities":                         {ScopeAdmin},
		"DELETE /v1/identities/{name}":                {ScopeAdmin},
		"GET /metrics":                                {ScopeMetrics, ScopeRead},
		"GET /healthz":                                nil,
		"GET /readyz":                                 nil,
	}
}

// fleetWide operations are refused to identities that are limited to teams.
func fleetWide() []string {
	return []string{"POST /v1/control", "GET /metrics"}
}

func operations(s *Server) map[string]*huma.Operation {
	ops := map[string]*huma.Operation{}
	for path, item := range s.api.OpenAPI().Paths {
		for method, op := range map[string]*huma.Operation{"GET": item.Get, "POST": item.Post, "PUT": item.Put, "PATCH": item.Patch, "DELETE": item.Delete, "HEAD": item.Head} {
			if op != nil {
				ops[method+" "+path] = op
			}
		}
	}
	return ops
}

// call performs an operation on a credential of team orders that does not exist.
func (e *env) call(op, token string) (int, string) {
	method, path, _ := strings.Cut(op, " ")
	path = strings.NewReplacer("{team}", "orders", "{name}", "nobody", "{id}", "none").Replace(path)
	body := "{}"
	if strings.HasSuffix(path, "/control") {
		body = `{"paused":false}`
	}
	var in *strings.Reader
	if method == http.MethodPost {
		in = strings.NewReader(body)
		res, b := e.raw(method, path, token, in)
		return res.StatusCode, b
	}
	res, b := e.raw(method, path, token, nil)
	return res.StatusCode, b
}

func TestPermissionMatrix(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	have := slices.Sorted(maps.Keys(operations(e.server)))
	if want := slices.Sorted(maps.Keys(matrix())); !slices.Equal(have, want) {
		t.Fatalf("operations are\n%s\nthe matrix has\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
	tokens := map[Scope]string{}
	limited := map[Scope]string{}
	for _, scope := range Scopes() {
		token, hash := NewToken()
		tokens[scope] = token
		if _, err := e.ids.Add(Identity{Name: "only-" + string(scope), Scopes: []Scope{scope}, TokenSHA256: hash}); err != nil {
			t.Fatal(err)
		}
		if scope == ScopeAdmin {
			continue
		}
		token, hash = NewToken()
		limited[scope] = token
		if _, err := e.ids.Add(Identity{Name: "other-team-" + string(scope), Scopes: []Scope{scope}, Teams: []string{"billing"}, TokenSHA256: hash}); err != nil {
			t.Fatal(err)
		}
	}
	denied := func(status int) bool { return status == http.StatusUnauthorized || status == http.StatusForbidden }
	checks := 0
	for op, allowed := range matrix() {
		for _, token := range []string{"", "rekey_wrong", tokens[ScopeRead] + "x", strings.ToUpper(tokens[ScopeAdmin])} {
			checks++
			if status, body := e.call(op, token); (status == http.StatusUnauthorized) != (allowed != nil) {
				t.Errorf("%s without a valid token: %d %s", op, status, body)
			}
		}
		for scope, token := range tokens {
			checks++
			status, body := e.call(op, token)
			may := allowed == nil || slices.Contains(allowed, scope)
			wrong := status == http.StatusUnprocessableEntity && op != "POST /v1/apply" && op != "POST /v1/identities" // those want a body
			if denied(status) == may || wrong || status >= 500 {
				t.Errorf("%s with scope %s: %d %s", op, scope, status, body)
			}
			if !may && allowed != nil && !strings.Contains(body, "this needs "+strings.ReplaceAll(joined(allowed), ",", " or")) {
				t.Errorf("%s with scope %s does not say what it needs: %s", op, scope, body)
			}
		}
		for scope, token := range limited {
			if allowed == nil || !slices.Contains(allowed, scope) {
				continue
			}
			checks++
			status, body := e.call(op, token)
			wantDenied := strings.Contains(op, "{team}") || slices.Contains(fleetWide(), op)
			if denied(status) != wantDenied || status >= 500 {
				t.Errorf("%s with scope %s for another team: %d %s", op, scope, status, body)
			}
		}
	}
	t.Logf("%d checks", checks)
	// Nothing of all that changed anything: the identity that no call was allowed to remove is there, the fleet runs.
	if c, err := e.admin.Control(t.Context()); err != nil || c.Paused {
		t.Errorf("control: %+v %v", c, err)
	}
}

func TestUnknownRoutesAreProblems(t *testing.T) {
	e := start(t)
	for path, want := range map[string]int{"/": 404, "/v1/secrets": 404, "/v1/credentials/orders%2Fdb": 404, "/v1/credentials/a/b/reveal": 404} {
		res, body := e.raw(http.MethodGet, path, "", nil)
		if res.StatusCode != want || !strings.Contains(res.Header.Get("Content-Type"), "problem+json") {
			t.Errorf("%s: %d %s %s", path, res.StatusCode, res.Header.Get("Content-Type"), body)
		}
	}
	if res, _ := e.raw(http.MethodPut, "/v1/credentials", "", nil); res.StatusCode != http.StatusMethodNotAllowed || res.Header.Get("Allow") == "" {
		t.Errorf("PUT: %d, Allow %q", res.StatusCode, res.Header.Get("Allow"))
	}
}

// A team's identity sees its own credentials and nothing that tells of others.
func TestTeamRestriction(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db", "billing/db"))
	e.drive("orders/db", "draining")
	e.drive("billing/db", "draining")
	eventually(t, "inventory", func() bool {
		l, err := e.admin.List(t.Context(), Filter{State: "ok"})
		return err == nil && len(l) == 2
	})
	ctx := t.Context()
	c := e.as("billing-team", []string{"billing"}, ScopeRead, ScopeRotate, ScopeEmergency, ScopeApply)

	list, err := c.List(ctx, Filter{})
	if err != nil || len(list) != 1 || list[0].ID != "billing/db" {
		t.Errorf("list: %+v %v", list, err)
	}
	_, err = c.Get(ctx, "orders/db")
	refused(t, err, http.StatusForbidden, "limited to billing")
	_, err = c.Get(ctx, "orders/nothing") // the same for what does not exist
	refused(t, err, http.StatusForbidden, "limited to billing")
	_, err = c.Get(ctx, "billing/dbx")
	refused(t, err, http.StatusNotFound, `did you mean billing/db?`)

	var subjects []string
	if err := c.Events(ctx, StreamQuery{}, func(e Event) error { subjects = append(subjects, e.Subject); return nil }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(slices.Compact(subjects), []string{"billing/db"}) {
		t.Errorf("events of %v", subjects)
	}
	refused(t, c.Events(ctx, StreamQuery{Credential: "orders/db"}, nil), http.StatusForbidden)
	refused(t, c.Audit(ctx, StreamQuery{Team: "orders"}, nil), http.StatusForbidden)
	if err := c.Audit(ctx, StreamQuery{}, func(a AuditEntry) error {
		if a.Credential != "billing/db" {
			t.Errorf("audit entry of %s", a.Credential)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if v, err := c.Verify(ctx); err != nil || v.Credentials != 1 || v.Found != 0 {
		t.Errorf("verify: %+v %v", v, err)
	}

	// Another team's order is not there for it.
	if _, err := e.admin.Order(ctx, "orders/db", "kill", "leak-1", "leak"); err != nil {
		t.Fatal(err)
	}
	_, err = c.Incident(ctx, "leak-1")
	refused(t, err, http.StatusNotFound, "no incident")

	// It declares its own and leaves the rest alone.
	q := declare("billing/db", "billing/cache")
	out, err := c.Apply(ctx, q)
	if err != nil || out.Failed > 0 {
		t.Fatalf("apply: %+v %v", out, err)
	}
	for _, ch := range out.Changes {
		if ch.ID == "orders/db" {
			t.Errorf("its apply touches %s: %s", ch.ID, ch.Action)
		}
	}
	_, err = c.Apply(ctx, declare("billing/db", "orders/db"))
	refused(t, err, http.StatusForbidden, "orders/db is not theirs")
	q = declare("billing/db")
	q.Targets[0].Concurrency = 100
	_, err = c.Apply(ctx, q)
	refused(t, err, http.StatusForbidden, "cannot add or change target db")
	if r, _, err := e.ledger.Get(ctx, "orders/db"); err != nil || !r.Managed {
		t.Errorf("orders/db: managed %v, %v", r.Managed, err)
	}
}
