// Package e2e tests the whole: the built program as separate processes, real PostgreSQL, embedded and external NATS, and clients that
// log in with whatever the store says, while processes are killed, frozen and stopped.
package e2e
