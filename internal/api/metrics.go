package api

import (
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/rekeyhq/rekey/internal/credential"
)

// Metrics are what /metrics shows. Steps are told by workers, commits by the ledger (it is a ledger.Observer); what is the case
// now is counted from the inventory at each scrape. No label holds a credential's id: their number is not bounded.
type Metrics struct {
	registry  *prometheus.Registry
	rotations *prometheus.CounterVec
	failures  *prometheus.CounterVec
	steps     *prometheus.HistogramVec
	lateness  prometheus.Histogram
	commits   *prometheus.HistogramVec
	batches   *prometheus.HistogramVec
	batchSize prometheus.Histogram
	lag       *prometheus.GaugeVec
	fleet     atomic.Pointer[fleet]
}

// NewMetrics makes metrics in a registry of their own.
func NewMetrics() *Metrics {
	quick := prometheus.ExponentialBuckets(0.0005, 2, 15) // 0.5 ms to 8 s
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		rotations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rekey_rotations_total", Help: "Rotations by target and how far they came: promoted, revoked (the old version is gone), abandoned, killed.",
		}, []string{"target", "result"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rekey_failures_total", Help: "Failed steps by target and class of failure.",
		}, []string{"target", "class"}),
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rekey_step_seconds", Help: "Time that a step took, retries included.", Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 12),
		}, []string{"phase"}),
		lateness: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "rekey_lateness_seconds", Help: "How long after its due instant a step began.", Buckets: []float64{.01, .05, .1, .25, .5, 1, 2, 5, 10, 30, 60, 300, 900, 3600},
		}),
		commits: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rekey_ledger_commit_seconds", Help: "Time of a commit by result: ok, stale, uncertain, refused.", Buckets: quick,
		}, []string{"result"}),
		batches: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rekey_ledger_batch_seconds", Help: "Time of an atomic batch by result.", Buckets: quick,
		}, []string{"result"}),
		batchSize: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "rekey_ledger_batch_transitions", Help: "Transitions that shared a batch.", Buckets: prometheus.ExponentialBuckets(1, 2, 10),
		}),
		lag: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rekey_source_lag_seconds", Help: "How far a stream is behind the ledger.",
		}, []string{"stream"}),
	}
	m.registry.MustRegister(m.rotations, m.failures, m.steps, m.lateness, m.commits, m.batches, m.batchSize, m.lag, &census{m},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Step counts one step that a worker performed: phase and result as the protocol names them, class only if it failed, late only if
// it followed a due instant.
func (m *Metrics) Step(target, phase, result, class string, took, late time.Duration) {
	m.steps.WithLabelValues(phase).Observe(took.Seconds())
	if late > 0 {
		m.lateness.Observe(late.Seconds())
	}
	if result == string(credential.Failed) {
		m.failures.WithLabelValues(target, class).Inc()
		return
	}
	if result != string(credential.Done) {
		return
	}
	switch credential.Phase(phase) {
	case credential.Promoting:
		m.rotations.WithLabelValues(target, "promoted").Inc()
	case credential.Destroying:
		m.rotations.WithLabelValues(target, "revoked").Inc()
	case credential.Discarding:
		m.rotations.WithLabelValues(target, "abandoned").Inc()
	case credential.Killing:
		m.rotations.WithLabelValues(target, "killed").Inc()
	default:
	}
}

// Committed is part of ledger.Observer.
func (m *Metrics) Committed(result string, took time.Duration) {
	m.commits.WithLabelValues(result).Observe(took.Seconds())
}

// Batched is part of ledger.Observer.
func (m *Metrics) Batched(result string, transitions, _ int, took time.Duration) {
	m.batches.WithLabelValues(result).Observe(took.Seconds())
	m.batchSize.Observe(float64(transitions))
}

func (m *Metrics) watch(f *fleet) { m.fleet.Store(f) }

func (m *Metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 30 * time.Second})
}

// census counts the inventory at each scrape.
type census struct{ m *Metrics }

func (c *census) gauges() map[string]*prometheus.Desc {
	of := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("rekey_"+name, help, labels, nil)
	}
	return map[string]*prometheus.Desc{
		"state":     of("credentials", "Credentials by target and state.", "target", "state"),
		"parked":    of("parked", "Credentials that wait for a human.", "target"),
		"suspended": of("suspended", "Credentials that an emergency has disabled.", "target"),
		"overlaps":  of("overlaps_open", "Credentials whose old and new version both work.", "target"),
		"overdue":   of("overdue", "Credentials that are older than their calendar allows.", "target"),
	}
}

// Describe is part of prometheus.Collector.
func (c *census) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.gauges() {
		ch <- d
	}
}

// Collect is part of prometheus.Collector. Before the inventory has been read it shows nothing, rather than zeros.
func (c *census) Collect(ch chan<- prometheus.Metric) {
	f := c.m.fleet.Load()
	if f == nil || !f.isReady() {
		return
	}
	type row struct{ target, state string }
	states := map[row]float64{}
	counts := map[string]map[string]float64{"parked": {}, "suspended": {}, "overlaps": {}, "overdue": {}}
	count := func(gauge, target string, is bool) {
		n := counts[gauge][target] // a target without any shows 0
		if is {
			n++
		}
		counts[gauge][target] = n
	}
	f.each(func(r credential.Record) {
		t := r.Spec.Target
		states[row{t, r.State()}]++
		count("parked", t, r.Parked != nil)
		count("suspended", t, r.Phase == credential.Suspended)
		count("overlaps", t, r.Phase == credential.Draining)
		count("overdue", t, r.Overdue)
	})
	gauges := c.gauges()
	for r, n := range states {
		ch <- prometheus.MustNewConstMetric(gauges["state"], prometheus.GaugeValue, n, r.target, r.state)
	}
	for gauge, byTarget := range counts {
		for target, n := range byTarget {
			ch <- prometheus.MustNewConstMetric(gauges[gauge], prometheus.GaugeValue, n, target)
		}
	}
}
