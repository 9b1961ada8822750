package api

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/rekeyhq/rekey/internal/ledger"
)

// Readiness says whether the server can do its work, and if not, why.
type Readiness struct {
	Ready  bool              `json:"ready"`
	Checks map[string]string `json:"checks" doc:"Each is ok, or says what is wrong"`
}

type (
	healthOutput struct {
		Body struct {
			Status string `json:"status"`
		}
	}
	readyOutput struct {
		Status int
		Body   Readiness
	}
)

func (s *Server) registerHealth() {
	add(s, operation(http.MethodGet, "/healthz", "healthz", "Is the process alive?", need{open: true}), func(context.Context, *struct{}) (*healthOutput, error) {
		out := &healthOutput{}
		out.Body.Status = "ok"
		return out, nil
	})
	add(s, operation(http.MethodGet, "/readyz", "readyz", "Can the server do its work?", need{open: true}), s.ready)
	op := operation(http.MethodGet, "/metrics", "metrics", "Prometheus metrics", need{scopes: []Scope{ScopeMetrics, ScopeRead}, fleet: true})
	op.Responses = map[string]*huma.Response{"200": {Description: "Prometheus text format", Content: map[string]*huma.MediaType{"text/plain": {}}}}
	metrics := s.Metrics.handler()
	add(s, op, func(context.Context, *struct{}) (*huma.StreamResponse, error) {
		return &huma.StreamResponse{Body: func(hc huma.Context) {
			r, w := humago.Unwrap(hc)
			metrics.ServeHTTP(w, r)
		}}, nil
	})
}

func (s *Server) ready(ctx context.Context, _ *struct{}) (*readyOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	out := &readyOutput{Status: http.StatusOK, Body: Readiness{Ready: true, Checks: map[string]string{}}}
	check := func(name, wrong string) {
		if wrong == "" {
			out.Body.Checks[name] = "ok"
			return
		}
		out.Body.Ready, out.Status = false, http.StatusServiceUnavailable
		out.Body.Checks[name] = wrong
	}
	wrong := ""
	if _, _, err := s.Ledger.GetControl(ctx); err != nil {
		wrong = "it does not answer"
	}
	check("ledger", wrong)
	wrong = ""
	if !s.fleet.isReady() {
		wrong = "it is still being read"
	}
	check("inventory", wrong)
	lags, err := s.Ledger.SourceLag(ctx)
	if err != nil {
		check("streams", "their lag cannot be measured")
		return out, nil
	}
	for _, l := range lags {
		wrong = ""
		if l.Behind >= ledger.LagAlarm {
			wrong = l.Behind.Round(time.Second).String() + " behind the ledger"
		}
		check(l.Stream, wrong)
	}
	return out, nil
}
