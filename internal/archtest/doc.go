// Package archtest holds the test that enforces who may import whom. It has no other code.
package archtest
