package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestBadBodies(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	admin := e.admin.token
	rotate, apply := "/v1/credentials/orders/db/rotate", "/v1/apply"
	for name, c := range map[string]struct {
		path, body string
		want       []int
	}{
		"too large":          {rotate, `{"reason":"` + strings.Repeat("x", 100<<10) + `"}`, []int{413}},
		"apply too large":    {apply, `{"credentials":{"` + strings.Repeat("x", 5<<20) + `":{}}}`, []int{413}},
		"deep":               {apply, strings.Repeat("[", 1<<20), []int{400, 422}},
		"deep and closed":    {apply, `{"credentials":` + strings.Repeat(`{"a":`, 200000) + "1" + strings.Repeat("}", 200001), []int{400, 422}},
		"not JSON":           {rotate, `reason=x`, []int{400, 422}},
		"unknown member":     {rotate, `{"raison":"x"}`, []int{422}},
		"wrong type":         {rotate, `{"reason":7}`, []int{422}},
		"reason too long":    {rotate, `{"reason":"` + strings.Repeat("x", 2000) + `"}`, []int{422}},
		"null":               {apply, `null`, []int{400, 422}},
		"duration":           {apply, `{"targets":[{"name":"a","step_deadline":"soon"}],"credentials":{}}`, []int{400, 422}},
		"another's incident": {"/v1/credentials/orders/db/kill", `{"incident":"../../x"}`, []int{422}},
		"long id":            {"/v1/credentials/orders/" + strings.Repeat("x", 300) + "/rotate", `{}`, []int{422}},
		"wildcards":          {"/v1/credentials/orders/%2A/rotate", `{}`, []int{422}},
		"dots":               {"/v1/credentials/orders/a.b/rotate", `{}`, []int{422}},
	} {
		res, body := e.raw(http.MethodPost, c.path, admin, strings.NewReader(c.body))
		ok := false
		for _, want := range c.want {
			ok = ok || res.StatusCode == want
		}
		if !ok || !strings.Contains(res.Header.Get("Content-Type"), "problem+json") {
			t.Errorf("%s: %d %s %.300s, want %v", name, res.StatusCode, res.Header.Get("Content-Type"), body, c.want)
		}
		if len(body) > 10<<10 {
			t.Errorf("%s: the answer has %d bytes: it echoes what was sent", name, len(body))
		}
	}
	r, _, err := e.ledger.Get(t.Context(), "orders/db")
	if err != nil || r.Rev != 1 {
		t.Errorf("something was committed: rev %d, %v", r.Rev, err)
	}
}

// A validation error never repeats a value: it may be a secret that somebody took for a reference.
func TestAnswersDoNotEcho(t *testing.T) {
	e := start(t)
	for _, body := range []string{
		`{"reason":["hunter2"]}`, `{"reason":{"password":"hunter2"}}`, `{"hunter2":1}`[:0] + `{"reason":7,"extra":"hunter2"}`,
	} {
		_, answer := e.raw(http.MethodPost, "/v1/credentials/orders/db/rotate", e.admin.token, strings.NewReader(body))
		if strings.Contains(answer, "hunter2") {
			t.Errorf("%s is echoed: %s", body, answer)
		}
	}
}

// Clients that dribble do not keep others out, and are let go.
func TestSlowClients(t *testing.T) {
	e := start(t, func(c *Config) { c.MaxConnections = 50 })
	e.apply(declare("orders/db"))
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for i := range 1000 {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", e.socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		fmt.Fprintf(c, "POST /v1/credentials/orders/db/kill HTTP/1.1\r\nHost: x\r\nX-%d: ", i) // and nothing more
		if i%200 == 0 {
			began := time.Now()
			if _, err := e.admin.Get(t.Context(), "orders/db"); err != nil {
				t.Fatalf("with %d slow clients: %v", i, err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("with %d slow clients a request took %s", i, took)
			}
		}
	}
	began := time.Now()
	if _, err := e.admin.Order(t.Context(), "orders/db", "kill", "", ""); err != nil {
		t.Fatal(err)
	}
	t.Logf("kill beside 1000 slow clients: %s", time.Since(began))
	// The oldest was closed to make room, long before its header's time was over.
	_ = conns[0].SetReadDeadline(time.Now().Add(headerTimeout / 5))
	if _, err := conns[0].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("the oldest slow client is still connected: %v", err)
	}
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	if grew := int64(after.HeapInuse) - int64(before.HeapInuse); grew > 64<<20 {
		t.Errorf("memory grew by %d MiB", grew>>20)
	}
}

// A body that does not come is not waited for longer than a few seconds, and holds no lock meanwhile.
func TestSlowBody(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "POST /v1/apply HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 1000\r\n\r\n{", e.admin.token)
	e.apply(declare("orders/db")) // while the other one dribbles
	_ = c.SetReadDeadline(time.Now().Add(15 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusRequestTimeout && res.StatusCode != http.StatusBadRequest {
		t.Errorf("status %d", res.StatusCode)
	}
}

// An identity's open streams do not keep it from anything else.
func TestConcurrencyLimits(t *testing.T) {
	e := start(t)
	e.apply(declare("orders/db"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := make(chan error, 100)
	for range laneStream.limit() {
		go func() {
			res, err := e.admin.send(ctx, http.MethodGet, "/v1/events", StreamQuery{Follow: true}.values(), nil)
			open <- err
			if err == nil {
				_, _ = io.Copy(io.Discard, res.Body)
				res.Body.Close()
			}
		}()
	}
	for range laneStream.limit() {
		if err := <-open; err != nil {
			t.Fatal(err)
		}
	}
	_, err := e.admin.send(ctx, http.MethodGet, "/v1/audit", StreamQuery{Follow: true}.values(), nil)
	refused(t, err, http.StatusTooManyRequests, "16 requests of this kind")
	if _, err := e.admin.Order(ctx, "orders/db", "kill", "", ""); err != nil {
		t.Errorf("kill beside open streams: %v", err)
	}
	if _, err := e.admin.Get(ctx, "orders/db"); err != nil {
		t.Errorf("get beside open streams: %v", err)
	}
	cancel()
	eventually(t, "the places are free again", func() bool {
		err := e.admin.Events(t.Context(), StreamQuery{}, func(Event) error { return nil })
		return err == nil
	})
}
