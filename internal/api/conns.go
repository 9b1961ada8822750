package api

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"sync"
)

// connections bounds how many connections are open. When there are more, the oldest that is not inside a handler is
// closed: a client that dribbles its header loses its place, one that is being served keeps it.
type connections struct {
	max   int
	mu    sync.Mutex
	order *list.List // of *connection, oldest first
	byNet map[net.Conn]*list.Element
}

type connection struct {
	net.Conn
	serving int
}

type connectionKey struct{}

func newConnections(limit int) *connections {
	return &connections{max: limit, order: list.New(), byNet: map[net.Conn]*list.Element{}}
}

// context is http.Server's first sight of a connection.
func (c *connections) context(ctx context.Context, conn net.Conn) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	entry := &connection{Conn: conn}
	c.byNet[conn] = c.order.PushBack(entry)
	if c.order.Len() > c.max {
		c.evict()
	}
	return context.WithValue(ctx, connectionKey{}, entry)
}

func (c *connections) state(conn net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.byNet[conn]; e != nil {
		c.order.Remove(e)
		delete(c.byNet, conn)
	}
}

// evict closes the oldest connection that nothing is being answered on; the newest if all are busy.
func (c *connections) evict() {
	victim := c.order.Back()
	for e := c.order.Front(); e != nil; e = e.Next() {
		if e.Value.(*connection).serving == 0 {
			victim = e
			break
		}
	}
	conn := victim.Value.(*connection).Conn
	c.order.Remove(victim)
	delete(c.byNet, conn)
	_ = conn.Close()
}

// busy marks a connection while h answers on it.
func (c *connections) busy(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if conn, ok := r.Context().Value(connectionKey{}).(*connection); ok {
			c.add(conn, 1)
			defer c.add(conn, -1)
		}
		h.ServeHTTP(w, r)
	})
}

func (c *connections) add(conn *connection, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.serving += n
}
